"""Bits for components: where the next bit takes most of the error away. Pure functions.

The energy of a component is what leaving it out would cost: its importance times its variance. Of
that n bits leave a share ε(n), the same for all components, so Σ energy · ε(bits) is to be made
small (reverse water-filling with the curve of the quantiser instead of 2^(−2n)). Energies of
several layers, of keys and of values may stand in one tensor if they have one unit: then all share
one budget, and nothing else decides between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from tpa_convert.modeling.tpa_codes import (
    HEADER_BYTES,
    MAX_BITS,
    ROW_WORD,
    tier_bits_of,
)

# A uniform midrise quantiser of 0 … 8 bits for a Gaussian of unit variance: the step with the least
# squared error, and that error (Max, "Quantizing for minimum distortion", 1960, table II).
GAUSSIAN_STEP = (1.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.05687, 0.03076)
GAUSSIAN_ERROR = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035, 8.714e-5)
LEVELS = (0, 1, 2, 3, 4, 8)
NO_ENERGY = 1e-300


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
    _check_levels(levels)
    if budget < 0:
        raise ValueError(f"a budget of {budget} bits")
    steps = envelope(sorted(levels))
    if not steps:
        return torch.zeros_like(energy, dtype=torch.long)
    gain = torch.stack(
        [(GAUSSIAN_ERROR[a] - GAUSSIAN_ERROR[b]) / (b - a) * energy.double() for a, b in steps]
    )
    cost = torch.tensor([b - a for a, b in steps], device=energy.device)
    cost = cost[:, None].expand_as(gain).flatten()
    # A stable sort takes the steps of one component in order also where its gains are equal, so
    # that what is taken of a component is always a beginning.
    order = gain.flatten().sort(descending=True, stable=True).indices
    taken = order[cost[order].cumsum(0) <= budget]
    bits = torch.zeros_like(cost).index_copy_(0, taken, cost[taken])
    return bits.view_as(gain).sum(0)


def _check_levels(levels: Sequence[int]) -> None:
    if 0 not in levels or min(levels) < 0 or max(levels) > MAX_BITS:
        raise ValueError(f"levels {tuple(levels)}: 0 and up to {MAX_BITS} bits are possible")


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


def groups_of_bits(bits: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """Runs (bits, components) of components with these bits [c], most bits first, and which
    components these are in this order, int64; those without bits are left out."""
    order = bits.argsort(descending=True, stable=True)
    order = order[bits[order] > 0]
    values, counts = bits[order].unique_consecutive(return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True)), order


def fit_tiers(energy: Tensor, size: int, align: int = 2, levels: Sequence[int] = LEVELS) -> Tensor:
    """Bits of each component in tiers of at most `size` bytes together, padding included.

    More energy never gets fewer bits, so a row is how many of the strongest components get the most
    bits, how many of the next get the level below, and so on: dynamic programming over levels,
    components and bytes, in whole tiers. Exact, but for a tier that would reach beyond the last
    component, which counts as a whole one.

    Args:
        energy: non-negative, [c].
        align: what the bytes of each tier are padded to a multiple of.
        levels: bits that a component may have, 0 among them.

    Returns: int64 [c].

    Raises:
        ValueError: as `allocate_bits`.
    """
    if size < 0:
        raise ValueError(f"tiers of {size} bytes")
    _check_levels(levels)
    # Components without energy are as good as any where a row has none but these.
    energy = energy.double().clamp_min(NO_ENERGY)
    order = energy.argsort(descending=True, stable=True)
    # u: components in units of `align`, which 8 bits need; r: bytes in units of `align`
    blocks = size // align
    strongest = pad(energy[order].cpu(), (0, -len(energy) % align)).view(-1, align).sum(1)
    before = pad(strongest.cumsum(0), (1, 0))  # [u]: energy of the components before u
    last = len(before) - 1
    left = (before[-1] - before)[:, None].expand(-1, blocks + 1)  # [u, r]: error of all from u on
    u = torch.arange(last + 1)
    taken = {}
    for bits in sorted(b for b in levels if b):  # the lowest level comes last in a row
        unit = 8 // min(tier_bits_of(bits))
        size = bits * unit // 8
        counts = range(min(blocks // size, -(-last // unit)) + 1)
        errors = torch.full((len(counts), last + 1, blocks + 1), torch.inf, dtype=torch.float64)
        for n in counts:
            end = (u + n * unit).clamp_max(last)
            coded = GAUSSIAN_ERROR[bits] * (before[end] - before)
            errors[n, :, n * size :] = coded[:, None] + left[end, : blocks + 1 - n * size]
        left, taken[bits] = errors.min(0)
    result = torch.zeros(len(energy), dtype=torch.long)
    at, room = 0, blocks
    for bits in sorted(taken, reverse=True):
        n = int(taken[bits][min(at, last), room])
        unit = 8 // min(tier_bits_of(bits))
        result[align * at : align * (at + n * unit)] = bits
        at, room = at + n * unit, room - n * bits * unit // 8
    return torch.empty_like(order).index_copy_(0, order, result.to(order.device))


def unit_bytes(align: int, levels: Sequence[int]) -> int:
    """Bytes of the smallest whole tiers for codes of one of the levels: 3 bits need three times as
    many as others, in a tier of two bits and one of one."""
    return align * min((bits // min(tier_bits_of(bits)) for bits in levels if bits), default=1)


def least_row_bytes(align: int, levels: Sequence[int] = LEVELS) -> int:
    """Bytes of a row that has room for a code."""
    return -(-(HEADER_BYTES + unit_bytes(align, levels)) // ROW_WORD) * ROW_WORD


def share_bytes(
    parts: Sequence[Sequence[Tensor]],
    total_bytes: int,
    align: int = 2,
    levels: Sequence[int] = LEVELS,
) -> list[list[Tensor]]:
    """Bits of the components of every part of every layer, from one budget.

    Args:
        parts: energies [c] of each block of each part (keys or values of a layer), in one unit. A
            part has a row of its own, with one header.
        total_bytes: of one token's rows of all parts together, padding and headers included.
        align: what the bytes of each tier are padded to a multiple of.
        levels: bits that a component may have, 0 among them.

    Returns: int64 [c] for each block of each part; their rows have at most `total_bytes` bytes.

    Raises:
        ValueError: as `allocate_bits`, or no room for a header and one tier in every part.
    """
    least, unit = least_row_bytes(align, levels), unit_bytes(align, levels)
    if least * len(parts) > total_bytes:
        raise ValueError(
            f"{total_bytes} bytes a token have no room for {len(parts)} rows of {least} bytes"
        )
    # What is left of the last word is no budget; and more bytes never divide themselves worse.
    total_bytes -= total_bytes % ROW_WORD
    room = total_bytes - HEADER_BYTES * len(parts)
    blocks = [energy for part in parts for energy in part]
    ideal = allocate_bits(torch.cat(blocks), 8 * room, levels).split([len(e) for e in blocks])
    sizes = iter([bits.sum().item() / 8 for bits in ideal])
    ideal_bytes = [[next(sizes) for _ in part] for part in parts]
    words = share_units(
        [(HEADER_BYTES + sum(part)) / ROW_WORD for part in ideal_bytes],
        total_bytes // ROW_WORD,
        [least // ROW_WORD] * len(parts),
    )
    result = []
    for part, wanted, count in zip(parts, ideal_bytes, words, strict=True):
        units = (ROW_WORD * count - HEADER_BYTES) // unit
        shares = share_units([size / unit for size in wanted], units, [0] * len(wanted))
        result.append(
            [
                fit_tiers(energy, unit * share, align, levels)
                for energy, share in zip(part, shares, strict=True)
            ]
        )
    return result


def share_units(wanted: Sequence[float], total: int, least: Sequence[int]) -> list[int]:
    """Whole numbers near those wanted, each at least its `least`, `total` together or less if less
    is wanted: the largest remainders are rounded up.

    Raises:
        ValueError: `least` alone is more than `total`.
    """
    units = [max(low, int(size)) for size, low in zip(wanted, least, strict=True)]
    by_remainder = sorted(range(len(units)), key=lambda i: units[i] - wanted[i])
    spare = total - sum(units)
    for i in by_remainder[: max(0, spare)]:
        units[i] += 1
    while sum(units) > total:  # what the least took, those give that have most
        i = max(range(len(units)), key=lambda i: units[i] - least[i])
        if units[i] <= least[i]:
            raise ValueError(f"{total} units cannot hold {sum(least)}")
        units[i] -= 1
    return units
