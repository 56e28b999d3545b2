"""Bits for components: where the next bit takes most of the error away. Pure functions.

The energy of a component is what leaving it out would cost: its importance times its variance. With
n bits a share ε(n) of it is left, the same for all components, so Σ energy · ε(bits) is to be made
small (reverse water-filling with the curve of the quantiser instead of 2^(−2n)). Energies of several
layers and of keys and values may stand in one tensor if they have one unit: then layers and parts
share one budget, and nothing else decides between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tpa_convert.coding.codes import MAX_BITS, RowLayout, tier_bits_of

# A uniform midrise quantiser of 0 … 8 bits for a Gaussian of unit variance: the step with the least
# squared error, and that error (Max, "Quantizing for minimum distortion", 1960, table II).
GAUSSIAN_STEP = (1.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.05687, 0.03076)
GAUSSIAN_ERROR = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035, 8.714e-5)
LEVELS = (0, 1, 2, 3, 4, 8)


def allocate_bits(energy: Tensor, budget: int, levels: Sequence[int] = LEVELS) -> Tensor:
    """Bits of each component, without regard to how they pack.

    Greedy by gain per bit, along the lower convex envelope of ε over the levels, which is optimal
    for every budget that ends with a whole step.

    Args:
        energy: non-negative, [c].
        budget: most bits in all.
        levels: bits that a component may have, 0 among them.

    Returns: int64 [c].

    Raises:
        ValueError: levels without 0 or outside 0 … 8, or a negative budget.
    """
    if 0 not in levels or min(levels) < 0 or max(levels) > MAX_BITS or budget < 0:
        raise ValueError(f"levels {tuple(levels)} and {budget} bits: 0 to {MAX_BITS}, 0 or more")
    steps = envelope(sorted(levels))
    if not steps:
        return torch.zeros_like(energy, dtype=torch.long)
    gain = torch.stack(
        [(GAUSSIAN_ERROR[a] - GAUSSIAN_ERROR[b]) / (b - a) * energy.double() for a, b in steps]
    )
    cost = torch.tensor([b - a for a, b in steps], device=energy.device)
    cost = cost[:, None].expand_as(gain).flatten()
    # A stable sort takes the steps of one component in order also where its gains are equal, so that
    # what is taken of a component is always a beginning.
    order = gain.flatten().sort(descending=True, stable=True).indices
    taken = order[cost[order].cumsum(0) <= budget]
    bits = torch.zeros_like(cost).index_copy_(0, taken, cost[taken])
    return bits.view_as(gain).sum(0)


def envelope(levels: Sequence[int]) -> list[tuple[int, int]]:
    """Steps (from, to) between ascending `levels` along the lower convex envelope of ε."""
    steps, low = [], levels[0]
    while low < levels[-1]:
        slope = {
            b: (GAUSSIAN_ERROR[low] - GAUSSIAN_ERROR[b]) / (b - low) for b in levels if b > low
        }
        high = max(slope, key=lambda b: (slope[b], b))
        steps.append((low, high))
        low = high
    return steps


def remaining_error(energy: Tensor, bits: Tensor) -> Tensor:
    """Σ energy · ε(bits), a scalar, for both of one shape."""
    return (energy * energy.new_tensor(GAUSSIAN_ERROR)[bits]).sum()


def row_layout(bits: Tensor, align: int) -> tuple[RowLayout, Tensor]:
    """The layout of components with these bits [c], and the coded ones in its order, int64."""
    order = bits.argsort(descending=True, stable=True)
    order = order[bits[order] > 0]
    values, counts = bits[order].unique_consecutive(return_counts=True)
    groups = tuple(zip(values.tolist(), counts.tolist(), strict=True))
    return RowLayout(groups, align), order


def fit_row(
    energy: Tensor, row_bytes: int, align: int = 2, levels: Sequence[int] = LEVELS
) -> Tensor:
    """Bits of each component in a row of at most `row_bytes` bytes, padding and header included.

    The unpadded optimum says how many components each level gets. Each count is rounded to whole
    tiers, up, down or one further down, and the least error of all combinations that fit is taken.
    More energy never gets fewer bits. Levels should be few: 3^levels combinations are compared.

    Args:
        energy: non-negative, [c].
        row_bytes: of the row, at least its header's.
        align: what the bytes of each tier are padded to a multiple of.
        levels: bits that a component may have, 0 among them.

    Returns: int64 [c].

    Raises:
        ValueError: as `allocate_bits`, or no room for a header.
    """
    if row_bytes < RowLayout((), align).row_bytes:
        raise ValueError(f"a row of {row_bytes} bytes has no room for its header")
    ideal = allocate_bits(energy, 8 * row_bytes, levels)
    order = energy.argsort(descending=True, stable=True)
    left_out = torch.cat((energy.new_zeros(1), energy[order].cumsum(0))).double().tolist()
    chosen = sorted((b for b in levels if b), reverse=True)
    choices = []
    for bits in chosen:
        unit = 8 * align // min(tier_bits_of(bits))  # components of a tier without padding
        whole = int((ideal == bits).sum()) // unit * unit
        choices.append(sorted({max(0, whole + n * unit) for n in (-1, 0, 1)}))
    least, best = math.inf, ()
    for counts in itertools.product(*choices):
        groups, used, error = [], 0, left_out[-1]
        for bits, count in zip(chosen, counts, strict=True):
            end = min(used + count, len(energy))
            error -= (1 - GAUSSIAN_ERROR[bits]) * (left_out[end] - left_out[used])
            groups += [(bits, end - used)] if end > used else []
            used = end
        if error < least and RowLayout(tuple(groups), align).row_bytes <= row_bytes:
            least, best = error, tuple(groups)
    values = [bits for bits, count in best for _ in range(count)]
    result = torch.zeros_like(ideal)
    result[order[: len(values)]] = torch.tensor(values, dtype=torch.long, device=result.device)
    return result


def share_rows(
    energies: Sequence[Tensor], total_bytes: int, align: int = 2, levels: Sequence[int] = LEVELS
) -> list[Tensor]:
    """Bits of the components of every part of every layer, from one budget.

    Args:
        energies: [c] of each part, in one unit.
        total_bytes: of one token's rows of all parts together, padding and headers included.
        align: what the bytes of each tier are padded to a multiple of.
        levels: bits that a component may have, 0 among them.

    Returns: int64 [c] for each part; their rows have at most `total_bytes` bytes.

    Raises:
        ValueError: as `allocate_bits`, or no room for the headers.
    """
    header = RowLayout((), align).row_bytes
    room = total_bytes - header * len(energies)
    if room < 0:
        raise ValueError(f"{total_bytes} bytes have no room for {len(energies)} headers")
    ideal = allocate_bits(torch.cat(list(energies)), 8 * room, levels)
    sizes = [bits.sum().item() / 8 for bits in ideal.split([len(e) for e in energies])]
    words = [int(size // 2) for size in sizes]  # rows have an even number of bytes
    spare = min(len(words), room // 2 - sum(words))
    for i in sorted(range(len(sizes)), key=lambda i: 2 * words[i] - sizes[i])[:spare]:
        words[i] += 1
    return [
        fit_row(energy, header + 2 * n, align, levels)
        for energy, n in zip(energies, words, strict=True)
    ]
