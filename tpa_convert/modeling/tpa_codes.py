"""A cache coded in bits: components to codes to rows of bytes, and back.

A token keeps one row of bytes of a fixed length for each layer and part (keys or values): *tiers*
of codes with equally many bits, then a header byte.

    component c = mean[class, c] + scale · step[c] · (code − (2^bits[c] − 1) / 2)                (1)

Class and scale are the token's and lie in the header: the class in its high bits, below it the
scale in steps of 2^(1/8). All else is constant, so that attention can run on the codes: steps fold
into what the components meet, and each class adds one constant.

In a tier of b ∈ {1, 2, 4, 8} bits and n bytes, byte i holds the codes of components i, i + n,
i + 2n, …, in its lowest bits first: one shift and mask for all bytes gives the codes of n
components in a row. Codes of other lengths lie in several tiers, the longest with their lowest
bits: 3 bits are two low ones and a high one.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_BITS = 8
HEADER_BYTES = 1
ROW_WORD = 4
CLASSES = 2  # ordinary tokens, and sinks
SCALES_PER_OCTAVE = 8
LOWEST_OCTAVE = -8  # the scale of header 0, as a power of two
# Scales that are tried for a token, in octaves around the root mean square of its components.
TRIED_OCTAVES = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
AT_ONCE = 1 << 14  # numbers whose scales are tried side by side, not one after the other


class Tier(NamedTuple):
    """Codes, or parts of codes, of equally many bits side by side.

    Attributes:
        bits: 1, 2, 4 or 8.
        offset: first byte in the row.
        size: bytes, padding included.
        first: component of the first code.
        components: how many follow each other.
        shift: bits of the codes that lie in earlier tiers.
    """

    bits: int
    offset: int
    size: int
    first: int
    components: int
    shift: int


@dataclass(frozen=True)
class RowLayout:
    """Where the codes of one row lie.

    Attributes:
        groups: (bits, components) of each run of components with equal bits, in the order of the
            components.
        align: what the bytes of each tier are padded to a multiple of.
        tiers: in the order of their offsets.
        header: offset of the header byte.
        row_bytes: of a row, header and padding included: whole words of four bytes for kernels.

    Raises:
        ValueError: bits outside 1 … 8.
    """

    groups: tuple[tuple[int, int], ...]
    align: int = 2
    tiers: tuple[Tier, ...] = field(init=False, repr=False, compare=False)
    header: int = field(init=False, repr=False, compare=False)
    row_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once and for all: every token that is packed or unpacked asks.
        tiers = tiers_of(self.groups, self.align)
        header = sum(tier.size for tier in tiers)
        object.__setattr__(self, "tiers", tiers)
        object.__setattr__(self, "header", header)
        object.__setattr__(self, "row_bytes", round_up(header + HEADER_BYTES, ROW_WORD))

    @property
    def components(self) -> int:
        return sum(count for _, count in self.groups)

    @property
    def bits(self) -> list[int]:
        """Of each component."""
        return [bits for bits, count in self.groups for _ in range(count)]


def tiers_of(groups: tuple[tuple[int, int], ...], align: int) -> tuple[Tier, ...]:
    """The tiers of a row."""
    tiers: list[Tier] = []
    first = offset = 0
    for bits, count in groups:
        shift = 0
        for tier_bits in tier_bits_of(bits):
            size = tier_bytes(tier_bits, count, align)
            tiers.append(Tier(tier_bits, offset, size, first, count, shift))
            offset, shift = offset + size, shift + tier_bits
        first += count
    return tuple(tiers)


class RowTables(NamedTuple):
    """What codes and headers are looked up in: constants of a layout and a number of classes.

    Attributes:
        scales: what each header byte says, int32 [256, 2]: the bits of its fp32 scale, which a
            model that is cast keeps this way, and its class.
        tried: `TRIED_OCTAVES` in steps of the scale, int64 [7, 1].
        shifts: 0, 1, … 7, uint8 [8, 1].
        places: which code (the header being the last) fills each of 8 fields of each byte of a row,
            int64 [8 · row_bytes], field by field; None where no rows are made.
        fields: the shift down, mask and shift up of these, uint8 [3, 8 · row_bytes].
    """

    scales: Tensor
    tried: Tensor
    shifts: Tensor
    places: Tensor | None = None
    fields: Tensor | None = None


class HeaderTables(NamedTuple):
    """What headers are chosen by, which follows from a `Quantiser`'s other tables.

    Attributes:
        reach: half of the highest code, fp32 [c].
        highest: of the codes, fp32 [c].
        weighted: means times importance, fp32 [classes, c].
        size: of each mean, weighted, fp32 [classes].
        coded: how many components are, others being padding.
        weight: importance of a squared error in steps, fp32 [c].
    """

    reach: Tensor
    highest: Tensor
    weighted: Tensor
    size: Tensor
    coded: Tensor
    weight: Tensor


class Quantiser(NamedTuple):
    """How the coded components of one part of a layer become codes and numbers (1).

    Attributes:
        layout: of its rows, c components.
        mean: of each class of tokens, fp32 [classes, c]; the number of classes is a power of two.
        step: fp32 [c], larger than 0.
        spread: root mean square of each component around its class's mean, fp32 [c].
        importance: weight of a squared error of each component, relative to others, fp32 [c].
        highest: code of each component, uint8 [c].
        kept: tables of the layout; without them, they are made whenever they are needed.
        followed: what follows from the other tables; the same.
    """

    layout: RowLayout
    mean: Tensor
    step: Tensor
    spread: Tensor
    importance: Tensor
    highest: Tensor
    kept: RowTables | None = None
    followed: HeaderTables | None = None

    @property
    def tables(self) -> RowTables:
        return self.kept or row_tables(self.layout, len(self.mean), self.mean.device)

    @property
    def scale_bits(self) -> int:
        """Bits of the header that hold the scale."""
        return 8 - (len(self.mean) - 1).bit_length()

    @property
    def reach(self) -> Tensor:
        """Half of the highest code, fp32 [c]."""
        return self.highest.float() / 2 if self.followed is None else self.followed.reach

    @property
    def codes(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
        """All that codes of components follow from, as kernels take it."""
        parts = self.mean, self.step, self.spread, self.importance
        return *parts, self.reach, LOWEST_OCTAVE

    @property
    def header_tables(self) -> HeaderTables:
        if self.followed is not None:
            return self.followed
        weighted = self.mean * self.importance
        return HeaderTables(
            self.reach,
            self.highest.to(self.step.dtype),
            weighted,
            (self.mean * weighted).sum(-1),
            (self.highest > 0).sum().clamp_min(1),
            self.importance * self.step.square(),
        )


def highest_codes(layout: RowLayout) -> Tensor:
    """2^bits − 1 of each component, uint8 [c], on the CPU."""
    return torch.tensor([2**bits - 1 for bits in layout.bits], dtype=torch.uint8, device="cpu")


def row_tables(layout: RowLayout, classes: int, device: Any = "cpu") -> RowTables:
    """Tables of rows in `layout` whose headers tell so many classes apart."""
    scale_bits = 8 - (classes - 1).bit_length()
    header = torch.arange(256, device="cpu")
    scale = torch.exp2((header % 2**scale_bits).double() / SCALES_PER_OCTAVE + LOWEST_OCTAVE)
    scales = torch.stack((scale.float().view(torch.int32), (header >> scale_bits).int()), -1)
    tried = torch.tensor([int(SCALES_PER_OCTAVE * o) for o in TRIED_OCTAVES], device="cpu")
    shifts = torch.arange(8, dtype=torch.uint8, device="cpu")
    # A field that nothing fills has mask 0.
    table = torch.zeros(4, 8, layout.row_bytes, dtype=torch.uint8, device="cpu").long()
    for tier in layout.tiers:
        code = torch.arange(tier.components, device="cpu")
        plane, byte = code // tier.size, tier.offset + code % tier.size
        table[0, plane, byte] = tier.first + code
        table[1, plane, byte] = tier.shift
        table[2, plane, byte] = 2**tier.bits - 1
        table[3, plane, byte] = plane * tier.bits
    table[0, 0, layout.header] = layout.components
    table[2, 0, layout.header] = 255
    places, *fields = table.flatten(1)
    made = scales, tried[:, None], shifts[:, None], places, torch.stack(fields).to(torch.uint8)
    return RowTables(*(x.to(device) for x in made))


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below a number."""
    return -(-number // multiple) * multiple


def tier_bits_of(bits: int) -> list[int]:
    """Bits of the tiers that hold codes of `bits` bits, the tier of their lowest bits first.

    Raises:
        ValueError: bits outside 1 … 8.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits} bits a code: 1 to {MAX_BITS} are possible")
    return [b for b in (8, 4, 2, 1) if bits & b]


def tier_bytes(bits: int, count: int, align: int) -> int:
    """Bytes of a tier of `count` components, padding included."""
    return round_up(round_up(bits * count, 8) // 8, align)


NO_ROWS = RowLayout(())  # one for all layers, so that one compiled graph serves them


# ------------------------------------------------------------------------------- packing


def pack_rows(
    codes: Tensor, header: Tensor, layout: RowLayout, tables: RowTables | None = None
) -> Tensor:
    """Rows of bytes.

    Args:
        codes: uint8 [..., c], each below 2 to its bits.
        header: uint8 [...].
        tables: of the layout, with any number of classes.

    Returns: uint8 [..., row_bytes].

    Raises:
        ValueError: the layout has another number of components.
    """
    if codes.shape[-1] != layout.components:
        raise ValueError(f"{codes.shape[-1]} codes for {layout.components} components")
    *_, places, fields = tables or row_tables(layout, 1, codes.device)
    assert places is not None
    assert fields is not None
    down, mask, up = fields
    row = torch.cat((codes, header[..., None]), -1).index_select(-1, places)
    row = ((row >> down) & mask) << up
    for fields_left in (4, 2, 1):  # a sum of bytes is slow on a CPU
        half = fields_left * layout.row_bytes
        row = row[..., :half] | row[..., half:]
    return row


def unpack_rows(
    rows: Tensor, layout: RowLayout, shifts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_rows`: codes uint8 [..., c] and header uint8 [...].

    By tiers, since a CPU takes ten times as long to gather a byte as to shift it.

    Args:
        shifts: see `RowTables`.

    Raises:
        ValueError: rows of another length than the layout's.
    """
    if rows.shape[-1] != layout.row_bytes:
        raise ValueError(f"rows of {rows.shape[-1]} bytes in a layout of {layout.row_bytes}")
    if shifts is None:
        shifts = torch.arange(8, dtype=torch.uint8, device=rows.device)[:, None]
    parts: list[Tensor] = []
    for tier in layout.tiers:
        part = rows[..., tier.offset : tier.offset + tier.size]
        if tier.bits < MAX_BITS:
            planes = (part[..., None, :] >> shifts[:: tier.bits]) & (2**tier.bits - 1)
            part = planes.flatten(-2)
        part = part[..., : tier.components]
        if tier.shift:
            parts[-1] = parts[-1].add(part, alpha=2**tier.shift)
        else:
            parts.append(part)
    codes = torch.cat(parts, -1) if parts else rows[..., :0]
    return codes, rows[..., layout.header]


# ------------------------------------------------------------------------------- quantising


def scale_of(header: Tensor, quantiser: Quantiser) -> tuple[Tensor, Tensor]:
    """Scale fp32 [..., 1] and class int32 [...] of header bytes uint8 [...]."""
    said = quantiser.tables.scales[header.int()]
    return said[..., :1].view(torch.float32), said[..., 1]


@torch.no_grad()
def choose_header(x: Tensor, quantiser: Quantiser) -> Tensor:
    """Class and scale of each token, from its numbers alone.

    The class is that of the nearest mean. The scale is the one with the least error of a few around
    the root mean square of the components relative to their spread, which it has to follow up (or
    large components are clipped) as well as down (or the roundings of a sink, which hardly varies
    and is attended to most, weigh more than all others).

    Args:
        x: components fp32 [..., c].

    Returns: uint8 [...].
    """
    reach, highest, weighted, size, coded, weight = quantiser.header_tables
    label = (size - 2 * x @ weighted.mT).argmin(-1)
    centred = x - quantiser.mean[label]
    ratio = ((centred / quantiser.spread).square().sum(-1) / coded).sqrt()
    most = 2**quantiser.scale_bits - 1
    lowest = 2.0**LOWEST_OCTAVE
    around = SCALES_PER_OCTAVE * (ratio.clamp_min(lowest).log2() - LOWEST_OCTAVE)
    in_steps, settings = centred / quantiser.step, (weight, reach, highest)
    if x.numel() <= AT_ONCE:
        tried = (around[..., None, None] + quantiser.tables.tried).round_().clamp_(0, most)
        errors = scale_errors(in_steps[..., None, :], tried[..., 0], *settings)
        index = tried[..., 0].gather(-1, errors.argmin(-1, keepdim=True))[..., 0]
    else:
        best = torch.full_like(ratio, torch.inf)
        index = torch.zeros_like(ratio)
        for octaves in TRIED_OCTAVES:
            tried = (around + SCALES_PER_OCTAVE * octaves).round().clamp(0, most)
            error = scale_errors(in_steps, tried, *settings)
            index = torch.where(error < best, tried, index)
            best = torch.minimum(error, best)
    return ((label << quantiser.scale_bits) + index).to(torch.uint8)


def scale_errors(
    in_steps: Tensor, tried: Tensor, weight: Tensor, reach: Tensor, highest: Tensor
) -> Tensor:
    """Weighted squared errors [...] of rounding numbers in units of their steps [..., c] at the
    scales `tried` [...], as headers count them.

    In place where possible: on a CPU this is most of what coding costs.

    Args:
        weight, reach, highest: of each component, [c].
    """
    scale = torch.exp2(tried / SCALES_PER_OCTAVE + LOWEST_OCTAVE)
    unrounded = in_steps * scale.reciprocal()[..., None] + reach
    code = torch.minimum(unrounded.round().clamp_min_(0), highest)
    return (unrounded.sub_(code).square_() @ weight) * scale.square()


def quantise(x: Tensor, quantiser: Quantiser) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., c] and header uint8 [...] of components fp32 [..., c]."""
    header = choose_header(x, quantiser)
    scale, label = scale_of(header, quantiser)
    unrounded = (x - quantiser.mean[label]) / (scale * quantiser.step) + quantiser.reach
    highest = quantiser.header_tables.highest
    codes = torch.minimum(unrounded.round_().clamp_min_(0), highest)
    return codes.to(torch.uint8), header


def numbers_of(codes: Tensor, header: Tensor, quantiser: Quantiser) -> tuple[Tensor, Tensor]:
    """What (1) adds to the mean of a token's class, fp32 [..., c], and the class, int32 [...]."""
    scale, label = scale_of(header, quantiser)
    return scale * quantiser.step * (codes - quantiser.reach), label


def encode(x: Tensor, quantiser: Quantiser) -> Tensor:
    """Components fp32 [..., c] as rows uint8 [..., row_bytes]."""
    return pack_rows(*quantise(x, quantiser), quantiser.layout, quantiser.tables)


def decode(rows: Tensor, quantiser: Quantiser) -> tuple[Tensor, Tensor]:
    """Rows uint8 [..., row_bytes] as `numbers_of` gives them."""
    return numbers_of(*unpack_rows(rows, quantiser.layout, quantiser.tables.shifts), quantiser)


def straight_through(x: Tensor, quantiser: Quantiser) -> tuple[Tensor, Tensor]:
    """What `decode(encode(x))` gives, with the gradient of the identity for all of x [..., c] that
    is not clipped."""
    codes, header = quantise(x.detach(), quantiser)
    numbers, label = numbers_of(codes, header, quantiser)
    scale, _ = scale_of(header, quantiser)
    edge = scale * quantiser.step * (quantiser.reach + 0.5)
    passed = torch.where((x.detach() - quantiser.mean[label]).abs() <= edge, x, x.detach())
    return numbers + (passed - passed.detach()), label
