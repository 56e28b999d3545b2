"""Rows of bytes that hold a token's coded keys or values, as kernels read them.

A row holds tiers of codes and a header byte. In a tier of b ∈ {1, 2, 4, 8} bits and n bytes, byte i
holds the codes of components i, i + n, i + 2n, …, in its lowest bits first. Codes of other lengths
lie in several tiers, the first with their lowest bits. The header holds the token's class in its
high bits and below it the token's scale, in steps of 2^(1/8) from 2^`lowest_octave`:

    component c = mean[class, c] + scale · step[c] · (code − (2^bits − 1) / 2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SCALES_PER_OCTAVE = 8
FEATURES = 8  # come in multiples of so many: products want rows of whole words of 16 bytes


def whole_words(count: int) -> int:
    """So many features and the zeros behind them."""
    return -(-count // FEATURES) * FEATURES


def in_whole_words(features: Tensor) -> Tensor:
    """Features [..., n] with the zeros behind them."""
    count = features.shape[-1]
    return torch.nn.functional.pad(features, (0, whole_words(count) - count))


class Tier(NamedTuple):
    """Codes of equally many bits side by side.

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
    shift: int = 0


@dataclass(frozen=True, eq=False)
class CodedRows:
    """How rows of one part (keys or values) of a layer become numbers.

    Attributes:
        tiers: in any order; all components lie in at least one.
        header: offset of the header byte.
        step: [w] fp32, larger than 0.
        mean: of each class, [classes, w] fp32; the number of classes is a power of two.
        lowest_octave: the scale of the lowest header, as a power of two.
    """

    tiers: tuple[Tier, ...]
    header: int
    step: Tensor
    mean: Tensor
    lowest_octave: int = 0

    @property
    def width(self) -> int:
        return self.step.shape[0]

    @property
    def classes(self) -> int:
        return self.mean.shape[0]

    @property
    def scale_bits(self) -> int:
        """Bits of the header that hold the scale."""
        return 8 - (self.classes - 1).bit_length()

    def numbers(self, rows: Tensor) -> Tensor:
        """Components of uint8 `rows` [..., bytes], as [..., w] in the type of the steps."""
        header = rows[..., self.header].int()
        octave = (header & (2**self.scale_bits - 1)) / SCALES_PER_OCTAVE + self.lowest_octave
        codes = torch.zeros(*rows.shape[:-1], self.width, dtype=torch.int32, device=rows.device)
        bits = torch.zeros(self.width, dtype=torch.int32, device=rows.device)
        for tier in self.tiers:
            packed = rows[..., tier.offset : tier.offset + tier.size, None].int()
            shifts = torch.arange(0, 8, tier.bits, device=rows.device)
            fields = (packed >> shifts) & (2**tier.bits - 1)  # [..., size, planes]
            fields = fields.mT.flatten(-2)[..., : tier.components]
            part = slice(tier.first, tier.first + tier.components)
            codes[..., part] += fields << tier.shift
            bits[part] += tier.bits
        centred = codes - (torch.exp2(bits) - 1) / 2
        scaled = torch.exp2(octave.to(self.step.dtype))[..., None] * self.step * centred
        return self.mean[header >> self.scale_bits] + scaled
