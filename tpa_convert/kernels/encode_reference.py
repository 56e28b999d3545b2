"""Components to codes, in plain PyTorch: the truth that the encoding kernel is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import Tier

PLANES = 8  # codes that a byte holds at most
SCALES_PER_OCTAVE = 8
# Scales that are tried for a token, in header steps around the root mean square of its components.
TRIED_STEPS = range(-8, 17, 4)


class CodeTables(NamedTuple):
    """What makes codes of c components: fp32, of one part (keys or values) of a layer.

    Attributes:
        mean: of each class of tokens, [classes, c]; the number of classes is a power of two.
        step: [c], larger than 0.
        spread: root mean square of each component around its class's mean, [c].
        importance: weight of a squared error of each component, [c].
        reach: half of the highest code, (2^bits − 1) / 2, [c].
        lowest_octave: the scale of the lowest header, as a power of two.
    """

    mean: Tensor
    step: Tensor
    spread: Tensor
    importance: Tensor
    reach: Tensor
    lowest_octave: int = -8

    @property
    def scale_bits(self) -> int:
        """Bits of the header that hold the scale."""
        return scale_bits(len(self.mean))


def scale_bits(classes: int) -> int:
    """Bits of a header that are left for the scale beside the class."""
    return 8 - (classes - 1).bit_length()


class RowTables(NamedTuple):
    """Where codes lie in rows of n bytes, byte by byte.

    Attributes:
        component: of each code that a byte holds, lowest bits first, int32 [PLANES, n]; −1: none.
        bits: of each code in a byte, int32 [n].
        low: bits of these codes that lie in other bytes, below those that lie here, int32 [n].
        header: offset of the header byte.
    """

    component: Tensor
    bits: Tensor
    low: Tensor
    header: int


class RowCodes(NamedTuple):
    """What makes rows of components, in as few tensors as possible: the host hands over each.

    Attributes:
        numbers: the first five of `CodeTables`, below each other, [classes + 4, c].
        places: the first three of `RowTables`, int32 [PLANES + 2, n].
        header, lowest_octave: of these.
    """

    numbers: Tensor
    places: Tensor
    header: int
    lowest_octave: int


def row_codes(tables: CodeTables, rows: RowTables) -> RowCodes:
    """Both, of a layer's keys or values, on one device."""
    places = torch.cat((rows.component, rows.bits[None], rows.low[None]))
    return RowCodes(numbers_of(tables), places, rows.header, tables.lowest_octave)


def numbers_of(tables: CodeTables) -> Tensor:
    """See `RowCodes`."""
    of_components = [x[None] for x in tables[1:5]]
    return torch.cat((tables.mean, *of_components))


def row_tables(tiers: Sequence[Tier], header: int, row_bytes: int) -> RowTables:
    """Tables of the tiers of a row, on the CPU."""
    component = torch.full((PLANES, row_bytes), -1, dtype=torch.int32)
    bits, low = torch.ones(2, row_bytes, dtype=torch.int32)
    for bits_of, offset, size, first, count, shift in tiers:
        here = slice(offset, offset + size)
        code = torch.arange(8 // bits_of * size, dtype=torch.int32).view(-1, size)
        component[: len(code), here] = torch.where(code < count, code + first, -1)
        bits[here], low[here] = bits_of, shift
    return RowTables(component, bits, low, header)


def pack(codes: Tensor, header: Tensor, rows: RowTables) -> Tensor:
    """Rows of bytes, uint8 [..., n], of codes uint8 [..., c] and headers uint8 [...]."""
    fields = codes.int()[..., rows.component.clamp_min(0)]  # [..., PLANES, n]
    fields = (fields >> rows.low) & ((1 << rows.bits) - 1)
    plane = torch.arange(PLANES, device=codes.device, dtype=torch.int32)[:, None]
    fields = torch.where(rows.component < 0, 0, fields << (plane * rows.bits).clamp_max(8))
    packed = fields.sum(-2).to(torch.uint8)
    packed[..., rows.header] = header
    return packed


class Coded(NamedTuple):
    """Codes of tokens, and what the straight-through gradient needs of them.

    Attributes:
        header: class in the high bits, scale below, uint8 [...].
        codes: uint8 [..., c].
        scaled: scale · step · (code − reach), [..., c] in the type of the components.
        inside: which codes were not clipped, bool [..., c].
        label: the class, int64 [...].
    """

    header: Tensor
    codes: Tensor
    scaled: Tensor
    inside: Tensor
    label: Tensor


def encode_components(x: Tensor, tables: CodeTables) -> Coded:
    """Codes of components [..., c], with class and scale chosen token by token.

    The class is that of the nearest mean, errors weighted by importance. The scale is the one with
    the least weighted error of a few around the root mean square of the components relative to
    their spread.
    """
    mean, step, spread, importance, reach, lowest_octave = tables
    numbers = x.to(torch.promote_types(x.dtype, torch.float32))
    weighted = mean * importance
    label = ((mean * weighted).sum(-1) - 2 * numbers @ weighted.mT).argmin(-1)
    centred = numbers - mean[label]
    coded = (reach > 0).sum().clamp_min(1)  # others are padding
    ratio = ((centred / spread).square().sum(-1) / coded).sqrt()
    around = SCALES_PER_OCTAVE * (ratio.clamp_min(2.0**lowest_octave).log2() - lowest_octave)
    best = torch.full_like(ratio, torch.inf)
    index = torch.zeros_like(ratio)
    for steps in TRIED_STEPS:
        tried = (around + steps).round().clamp(0, 2**tables.scale_bits - 1)
        size = torch.exp2(tried / SCALES_PER_OCTAVE + lowest_octave)[..., None] * step
        code = _code(centred / size, reach).round()
        error = ((centred - size * (code - reach)).square() * importance).sum(-1)
        index = torch.where(error < best, tried, index)
        best = torch.minimum(error, best)
    # Rounded from fp64, as in a cache's table: exp2 of fp32 differs with the tensor's length.
    scale = torch.exp2(index.double() / SCALES_PER_OCTAVE + lowest_octave).to(index.dtype)
    size = scale[..., None] * step
    unclipped = centred / size + reach
    codes = _code(centred / size, reach).round()
    return Coded(
        (label << tables.scale_bits).to(torch.uint8) | index.to(torch.uint8),
        codes.to(torch.uint8),
        (size * (codes - reach)).to(x.dtype),
        (unclipped >= -0.5) & (unclipped <= 2 * reach + 0.5),
        label,
    )


def _code(u: Tensor, reach: Tensor) -> Tensor:
    """From 0 to 2 · reach, not rounded yet."""
    return torch.minimum((u + reach).clamp_min(0), 2 * reach)
