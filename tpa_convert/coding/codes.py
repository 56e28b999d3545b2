"""Components to codes to bytes, and back. Imports torch alone, so that an export can carry it.

A token keeps one row of bytes of a fixed length for each layer and part (keys or values): *tiers* of
codes with equally many bits, most bits first, then a header.

    component c = mean[class, c] + scale · step[c] · (code − (2^bits − 1) / 2)                    (1)

Class and scale are the token's and lie in the header: the class in its high bits, below it the scale
in steps of 2^(1/8). Everything else is constant, so that attention can run on the codes: steps fold
into what the components meet, and each class adds one constant.

In a tier of b ∈ {1, 2, 4, 8} bits and n bytes, byte i holds the codes of components i, i + n,
i + 2n, …, in its lowest bits first: one shift and mask for all bytes gives the codes of n components
in a row. Codes of other lengths lie in several tiers, the longest with their lowest bits: 3 bits
are 2 low ones and a high one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

HEADER_BYTES = 1
SCALES_PER_OCTAVE = 8
MAX_BITS = 8


class RowLayout(NamedTuple):
    """Where the codes of one row lie.

    Attributes:
        groups: (bits, components) of each run of components with equal bits, most bits first;
            components are in this order.
        align: what the bytes of each tier are padded to a multiple of.
    """

    groups: tuple[tuple[int, int], ...]
    align: int = 1

    @property
    def components(self) -> int:
        """Components that have a code."""
        return sum(count for _, count in self.groups)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, header and padding included."""
        return HEADER_BYTES + sum(
            tier_bytes(bits, count, self.align) for group in self.groups for bits, count in tiers(*group)
        )


def tiers(bits: int, count: int) -> list[tuple[int, int]]:
    """The tiers (bits, components) that hold the codes of one group, lowest bits of a code first.

    Raises:
        ValueError: bits outside 1 … 8.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits} bits a code: 1 to {MAX_BITS} are possible")
    return [(b, count) for b in (8, 4, 2, 1) if bits & b]


def tier_bytes(bits: int, count: int, align: int) -> int:
    """Bytes of a tier, padding included."""
    return math.ceil(math.ceil(bits * count / 8) / align) * align


def pack_tier(codes: Tensor, bits: int, size: int) -> Tensor:
    """Codes uint8 [..., n] below 2^bits as bytes [..., size], n ≤ 8 · size / bits."""
    planes = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, planes * size - codes.shape[-1]))
    shift = bits * torch.arange(planes, dtype=torch.uint8, device=codes.device)
    # The planes share no bits, so that their sum is their union.
    return (padded.unflatten(-1, (planes, size)) << shift[:, None]).sum(-2, dtype=torch.uint8)


def unpack_tier(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_tier`: bytes [..., size] as codes uint8 [..., count]."""
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None, :] >> shift[:, None]) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def pack_rows(header: Tensor, codes: Tensor, layout: RowLayout) -> Tensor:
    """Rows of bytes.

    Args:
        header: uint8 [...].
        codes: uint8 [..., components], each below 2 to the bits of its group.

    Returns: uint8 [..., row_bytes].

    Raises:
        ValueError: the layout has another number of components.
    """
    if codes.shape[-1] != layout.components:
        raise ValueError(f"{codes.shape[-1]} codes for {layout.components} components")
    parts = [header[..., None]]
    for (bits, count), part in zip(layout.groups, _split(codes, layout), strict=True):
        for tier, _ in tiers(bits, count):
            size = tier_bytes(tier, count, layout.align)
            parts.append(pack_tier(part & (2**tier - 1), tier, size))
            part = part >> tier if tier < MAX_BITS else part
    return torch.cat(parts, dim=-1)


def unpack_rows(rows: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_rows`: header uint8 [...] and codes uint8 [..., components].

    Raises:
        ValueError: rows of another length than the layout's.
    """
    if rows.shape[-1] != layout.row_bytes:
        raise ValueError(f"rows of {rows.shape[-1]} bytes in a layout of {layout.row_bytes}")
    offset, parts = HEADER_BYTES, []
    for bits, count in layout.groups:
        part, shift = rows.new_zeros(*rows.shape[:-1], count), 0
        for tier, _ in tiers(bits, count):
            size = tier_bytes(tier, count, layout.align)
            part = part | unpack_tier(rows[..., offset : offset + size], tier, count) << shift
            offset, shift = offset + size, shift + tier
        parts.append(part)
    codes = torch.cat(parts, dim=-1) if parts else rows.new_zeros(*rows.shape[:-1], 0)
    return rows[..., 0], codes


def _split(codes: Tensor, layout: RowLayout) -> tuple[Tensor, ...]:
    return codes.split([count for _, count in layout.groups], dim=-1) if layout.groups else ()
