"""Bits for components: where the next bit takes most of the error away. Pure functions.

The energy of a component is what leaving it out would cost: its importance times its variance. With
n bits a share ε(n) of it is left, the same for all components, so a sum Σ energy · ε(bits) is to be
made small (reverse water-filling with the quantiser's own curve instead of 2^(−2n)).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tpa_convert.coding.codes import HEADER_BYTES, MAX_BITS, tier_bytes, tiers

# Of a Gaussian of unit variance, uniform midrise quantiser of 0 … 8 bits: the step with the least
# squared error, and that error (Max, "Quantizing for minimum distortion", 1960, table II).
GAUSSIAN_STEP = (0.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
GAUSSIAN_ERROR = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035, 0.00008714)


def allocate_bits(energy: Tensor, budget: int, levels: Sequence[int]) -> Tensor:
    """Bits of each component, without regard to how they pack.

    Each component takes the level with the least energy · ε(bits) + λ · bits, which only lies on the
    lower convex envelope of ε, with the smallest λ whose bits fit: the greedy order by gain per bit.

    Args:
        energy: non-negative, [c].
        budget: most bits in all.
        levels: bits that a component may have, 0 among them.

    Returns: int64 [c].

    Raises:
        ValueError: levels without 0 or beyond 8, or a negative budget.
    """
    if 0 not in levels or not 0 <= min(levels) <= max(levels) <= MAX_BITS or budget < 0:
        raise ValueError(f"levels {tuple(levels)}, {budget} bits: 0 and levels up to 8, 0 bits or more")
    steps = envelope(sorted(levels))
    # the gain per bit of every step of every component, and what the step costs
    gain = torch.stack(
        [(GAUSSIAN_ERROR[a] - GAUSSIAN_ERROR[b]) / (b - a) * energy.double() for a, b in steps]
    )
    cost = torch.tensor([b - a for a, b in steps], device=energy.device)[:, None].expand_as(gain)
    order = gain.flatten().argsort(descending=True, stable=True)
    taken = cost.flatten()[order].cumsum(0) <= budget
    # the steps of a component come in order of its gains, so that what is taken is a prefix
    bits = torch.zeros_like(cost).flatten()
    bits[order[taken]] = cost.flatten()[order[taken]]
    return bits.view_as(cost).sum(0)


def envelope(levels: Sequence[int]) -> list[tuple[int, int]]:
    """Steps (from, to) between ascending `levels` along the lower convex envelope of ε."""
    steps, low = [], levels[0]
    while low < levels[-1]:
        slopes = {b: (GAUSSIAN_ERROR[low] - GAUSSIAN_ERROR[b]) / (b - low) for b in levels if b > low}
        high = max(slopes, key=lambda b: (slopes[b], b))
        steps.append((low, high))
        low = high
    return steps


def tier_unit(bits: int, align: int) -> int:
    """Fewest components with so many bits whose tiers need no padding."""
    return 8 * align // min(b for b, _ in tiers(bits, 1))


def fit_row(energy: Tensor, levels: Sequence[int], align: int, row_bytes: int) -> Tensor:
    """Bits of each component in a row of at most `row_bytes` bytes whose tiers are full.

    The unpadded optimum says how many components each level gets. Each number is rounded to whole
    tiers, down or up or one further, and the least error of all combinations that fit is taken. The
    strongest components have the most bits; only the last of them may leave a tier unfilled.

    Args:
        energy: non-negative, [c].
        levels: bits that a component may have, 0 among them.
        align: what the bytes of each tier are padded to a multiple of.
        row_bytes: header included.

    Returns: int64 [c].

    Raises:
        ValueError: as `allocate_bits`, or no room for a header.
    """
    room = row_bytes - HEADER_BYTES
    if room < 0:
        raise ValueError(f"a row of {row_bytes} bytes has no room for its header")
    ideal = allocate_bits(energy, 8 * room, levels)
    order = energy.argsort(descending=True, stable=True)
    below = torch.cat((energy.new_zeros(1), energy[order].cumsum(0))).double().tolist()
    chosen = sorted((b for b in levels if b), reverse=True)
    choices = []
    for bits in chosen:
        unit = tier_unit(bits, align)
        whole = int((ideal == bits).sum()) // unit * unit
        choices.append([n for n in range(whole - unit, whole + 3 * unit, unit) if n >= 0])
    best, counts = math.inf, (0,) * len(chosen)
    for candidate in itertools.product(*choices):
        used, size, error = 0, 0, below[-1]
        for bits, count in zip(chosen, candidate, strict=True):
            count = min(count, len(energy) - used)
            size += sum(tier_bytes(*tier, align) for tier in tiers(bits, count))
            error -= (1 - GAUSSIAN_ERROR[bits]) * (below[used + count] - below[used])
            used += count
        if size <= room and error < best:
            best, counts = error, candidate
    bits = torch.zeros_like(ideal)
    sizes = torch.tensor(counts)
    values = torch.tensor(chosen).repeat_interleave(sizes)[: len(energy)]
    bits[order[: len(values)]] = values.to(bits)
    return bits
