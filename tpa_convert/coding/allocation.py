"""Bits for components: where the next bit takes most of the error away. Pure functions.

The energy of a component is what leaving it out would cost: its importance times its variance. Of
that n bits leave a share ε(n), the same for all components, so Σ energy · ε(bits) is to be made
small (reverse water-filling with the curve of the quantiser instead of 2^(−2n)). Energies of
several layers, of keys and of values may stand in one tensor if they have one unit: then all share
one budget, and nothing else decides between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
MEAN_ROUNDS = 3
LOST = 1e9  # `left_out` that gives all that have energy a bit first


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


class TierTable(NamedTuple):
    """The best tiers of some components at every size.

    More energy never gets fewer bits, so a row is how many of the strongest components get the most
    bits, how many of the next get the level below, and so on: dynamic programming over levels,
    components and bytes, in whole tiers. Exact, but for a tier that would reach beyond the last
    component, which counts as a whole one.

    Attributes:
        error: Σ energy · ε(bits) with at most r · align bytes of tiers, fp64 [sizes].
        order: of the components by falling energy, int64 [c].
        taken: of each level, how many units of components get it, by first component and bytes.
        align: what the bytes of each tier are padded to a multiple of.
    """

    error: Tensor
    order: Tensor
    taken: dict[int, Tensor]
    align: int

    @classmethod
    def of(
        cls,
        energy: Tensor,
        size: int,
        align: int,
        levels: Sequence[int],
        left_out: float = GAUSSIAN_ERROR[0],
    ) -> TierTable:
        """Of components with these energies [c], for sizes up to this many bytes.

        Args:
            left_out: share of the energy that a component without bits counts as its error; where
                this is large, all that have energy get a bit before one gets more.
        """
        # Components without energy are as good as any where a row has none but these.
        energy = energy.double().clamp_min(NO_ENERGY)
        order = energy.argsort(descending=True, stable=True)
        # u: components in units of `align`, which 8 bits need; r: bytes in units of `align`
        strongest = pad(energy[order], (0, -len(energy) % align)).view(-1, align).sum(1)
        before = pad(strongest.cumsum(0), (1, 0))  # [u]: energy of the components before u
        last = len(before) - 1
        sizes = min(size // align, max((_whole(b, last) for b in levels if b), default=0))
        left = left_out * (before[-1] - before)  # [u]: of all from u on
        left = left[:, None].expand(-1, sizes + 1)  # [u, r]
        u = torch.arange(last + 1, device=energy.device)
        taken = {}
        for bits in sorted(b for b in levels if b):  # the lowest level comes last in a row
            unit = 8 // min(tier_bits_of(bits))
            size = bits * unit // 8
            counts = range(min(sizes // size, -(-last // unit)) + 1)
            errors = energy.new_full((len(counts), last + 1, sizes + 1), torch.inf)
            for n in counts:
                end = (u + n * unit).clamp_max(last)
                coded = GAUSSIAN_ERROR[bits] * (before[end] - before)
                errors[n, :, n * size :] = coded[:, None] + left[end, : sizes + 1 - n * size]
            left, taken[bits] = errors.min(0)
        return cls(left[0], order, taken, align)

    def bits(self, size: int) -> Tensor:
        """Of each component in tiers of at most `size` bytes, int64 [c]."""
        result = torch.zeros_like(self.order)
        at, room = 0, min(size // self.align, len(self.error) - 1)
        for bits in sorted(self.taken, reverse=True):
            n = int(self.taken[bits][min(at, len(self.taken[bits]) - 1), room])
            unit = 8 // min(tier_bits_of(bits))
            result[self.align * at : self.align * (at + n * unit)] = bits
            at, room = at + n * unit, room - n * bits * unit // 8
        return torch.empty_like(self.order).index_copy_(0, self.order, result)


def _whole(bits: int, last: int) -> int:
    """Bytes, in units of the alignment, of tiers that give all of `last` units so many bits."""
    unit = 8 // min(tier_bits_of(bits))
    return -(-last // unit) * (bits * unit // 8)


def fit_tiers(energy: Tensor, size: int, align: int = 2, levels: Sequence[int] = LEVELS) -> Tensor:
    """Bits of each component in tiers of at most `size` bytes together, padding included.

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
    return TierTable.of(energy, size, align, levels).bits(size)


def least_row_bytes(align: int, levels: Sequence[int] = LEVELS) -> int:
    """Bytes of a row that has room for a code."""
    smallest = align * min((_whole(bits, 1) for bits in levels if bits), default=1)
    return -(-(HEADER_BYTES + smallest) // ROW_WORD) * ROW_WORD


class RowTable(NamedTuple):
    """The best row of one part at every length.

    Attributes:
        error: of rows of so many words of four bytes, fp64 [words]; infinite where none fits.
        blocks: tiers of each block of the part.
        splits: sizes that the first blocks leave to the next, by the sizes of all of them.
    """

    error: Tensor
    blocks: list[TierTable]
    splits: list[Tensor]

    @classmethod
    def of(
        cls,
        energies: Sequence[Tensor],
        size: int,
        align: int,
        levels: Sequence[int],
        left_out: float = GAUSSIAN_ERROR[0],
    ) -> RowTable:
        """Of the blocks of one part, for rows of up to `size` bytes; `left_out` as in `TierTable`.

        Raises:
            ValueError: as `allocate_bits`.
        """
        _check_levels(levels)
        blocks = [TierTable.of(energy, size, align, levels, left_out) for energy in energies]
        error, splits = blocks[0].error, []
        most = (size - HEADER_BYTES) // align
        for block in blocks[1:]:
            sizes = min(most, len(error) + len(block.error) - 2) + 1
            split, r = [], torch.arange(sizes, device=error.device)
            for own in range(len(block.error)):
                first = (r - own).clamp_max(len(error) - 1)
                found = torch.where(first < 0, torch.inf, error[first.clamp_min(0)])
                split.append(found + block.error[own])
            error, chosen = torch.stack(split).min(0)
            splits.append(chosen)
        # A row is whole words, its header among them.
        words = -(-(HEADER_BYTES + align * (len(error) - 1)) // ROW_WORD)
        length = ROW_WORD * torch.arange(min(words, size // ROW_WORD) + 1, device=error.device)
        r = (length - HEADER_BYTES) // align
        row = torch.where(r < 0, torch.inf, error[r.clamp(0, len(error) - 1)])
        row[: least_row_bytes(align, levels) // ROW_WORD] = torch.inf
        return cls(row, blocks, splits)

    def bits(self, words: int) -> list[Tensor]:
        """Of the components of each block, in a row of so many words."""
        align = self.blocks[0].align
        room = (ROW_WORD * words - HEADER_BYTES) // align
        sizes = []
        for block, split in zip(reversed(self.blocks[1:]), reversed(self.splits), strict=True):
            own = int(split[min(room, len(split) - 1)])
            own = min(own, len(block.error) - 1)
            sizes.append(own)
            room = min(room, len(split) - 1) - own
        sizes.append(room)
        return [
            block.bits(align * size)
            for block, size in zip(self.blocks, reversed(sizes), strict=True)
        ]


def share_bytes(
    parts: Sequence[Sequence[Tensor]],
    total_bytes: int,
    align: int = 2,
    levels: Sequence[int] = LEVELS,
    mean: float | None = None,
) -> list[list[Tensor]]:
    """Bits of the components of every part of every layer, from one budget: each word goes where it
    takes most of the error away.

    Args:
        parts: energies [c] of each block of each part (keys or values of a layer), in one unit. A
            part has a row of its own, with one header.
        total_bytes: of one token's rows of all parts together, padding and headers included.
        align: what the bytes of each tier are padded to a multiple of.
        levels: bits that a component may have, 0 among them.
        mean: of the bits of the components that are kept; None keeps as many as is best.

    Returns: int64 [c] for each block of each part; their rows have at most `total_bytes` bytes.

    Raises:
        ValueError: as `allocate_bits`, or no room for a header and one tier in every part.
    """
    if mean is None:
        rows = [RowTable.of(part, total_bytes, align, levels) for part in parts]
        return share_rows(rows, total_bytes, align, levels)
    tried = []
    count = max(1, int(8 * (total_bytes - len(parts) * HEADER_BYTES) / mean))
    for _ in range(MEAN_ROUNDS):  # what tiers are padded with shifts the mean
        kept = strongest(parts, count)
        rows = [RowTable.of(part, total_bytes, align, levels, LOST) for part in kept]
        bits = share_rows(rows, total_bytes, align, levels)
        found = mean_bits(bits)
        tried.append((abs(found - mean), bits))
        count = max(1, round(count * found / mean))
    return min(tried, key=lambda one: one[0])[1]


def mean_bits(bits: Sequence[Sequence[Tensor]]) -> float:
    """Mean over the components that have any."""
    each = torch.cat([block for part in bits for block in part])
    return each[each > 0].double().mean().item()


def strongest(parts: Sequence[Sequence[Tensor]], count: int) -> list[list[Tensor]]:
    """The energies of the `count` strongest components of all blocks of all parts; others are 0."""
    energies = torch.cat([energy for part in parts for energy in part])
    if count >= len(energies):
        return [list(part) for part in parts]
    order = energies.argsort(descending=True, stable=True)
    kept = torch.zeros_like(energies).index_copy_(0, order[:count], energies[order[:count]])
    blocks = iter(kept.split([len(energy) for part in parts for energy in part]))
    return [[next(blocks) for _ in part] for part in parts]


def share_rows(
    rows: Sequence[RowTable], total_bytes: int, align: int = 2, levels: Sequence[int] = LEVELS
) -> list[list[Tensor]]:
    """`share_bytes` for parts whose best rows are known, of every length up to `total_bytes`."""
    least = least_row_bytes(align, levels)
    if least * len(rows) > total_bytes:
        raise ValueError(
            f"{total_bytes} bytes a token have no room for {len(rows)} rows of {least} bytes"
        )
    most = (total_bytes - least * (len(rows) - 1)) // ROW_WORD  # words that can be left to one
    errors = [row.error[: most + 1].cpu() for row in rows]
    words = share_words(errors, total_bytes // ROW_WORD, least // ROW_WORD)
    return [row.bits(count) for row, count in zip(rows, words, strict=True)]


def share_words(errors: Sequence[Tensor], total: int, least: int) -> list[int]:
    """How many words every row gets, `total` together at most.

    Greedy by gain per word along the lower convex envelope of each row's error, which is optimal
    for every total that ends with a whole step; what is left goes where it still helps most.

    Args:
        errors: of a row by its words, falling, [words] each.
        least: words of every row, in any case.
    """
    steps = []
    for i, error in enumerate(errors):
        at = least
        while at < len(error) - 1:
            slopes = (error[at] - error[at + 1 :]) / torch.arange(1, len(error) - at)
            ahead = len(slopes) - 1 - int(slopes.flip(0).argmax())  # the last of the best
            steps.append((slopes[ahead].item(), i, at, at + 1 + ahead))
            at += 1 + ahead
    words, spare = [least] * len(errors), total - least * len(errors)
    for gain, i, start, end in sorted(steps, key=lambda step: -step[0]):
        # Where a step did not fit, the later ones of that row do not begin.
        if gain > 0 and words[i] == start and end - start <= spare:
            words[i], spare = end, spare - (end - start)
    while spare > 0:
        gains = {
            (i, w): (errors[i][words[i]] - errors[i][w]).item() / (w - words[i])
            for i in range(len(errors))
            for w in range(words[i] + 1, min(words[i] + spare, len(errors[i]) - 1) + 1)
        }
        i, w = max(gains, key=lambda key: gains[key], default=(0, 0))
        if not gains or gains[i, w] <= 0:
            break
        words[i], spare = w, spare - (w - words[i])
    return words
