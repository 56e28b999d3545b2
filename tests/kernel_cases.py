"""Random caches for the tests of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_convert.kernels.rows import CodedRows, Tier


def bounds(batch: int, slots: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """First slots in use and their ends, one sequence with padding on both sides, one without."""
    start = torch.randint(0, max(1, slots // 3), (batch,), generator=generator)
    end = slots - torch.randint(0, max(1, slots // 3), (batch,), generator=generator)
    start[-1], end[-1] = 0, slots
    return start, end


def poison(cache: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """`cache` [b, 1, t, w] with NaN in the slots that are not in use."""
    slot = torch.arange(cache.shape[2], device=cache.device)[None, None, :, None]
    start, end = (x.to(cache.device)[:, None, None, None] for x in (start, end))
    return torch.where((slot < start) | (slot >= end), torch.nan, cache)


def random_layout(
    groups: list[tuple[int, int]], classes: int, generator: torch.Generator, align: int = 4
) -> tuple[CodedRows, int]:
    """Rows of `groups` of (bits, components), header last, and their bytes."""
    tiers, offset, first = [], 0, 0
    for bits, count in groups:
        shift = 0
        for b in (8, 4, 2, 1):
            if bits & b:
                size = -(-b * count // 8)
                size = -(-size // align) * align
                tiers.append(Tier(b, offset, size, first, count, shift))
                offset, shift = offset + size, shift + b
        first += count
    step = torch.rand(first, generator=generator) * 0.1 + 0.02
    mean = torch.randn(classes, first, generator=generator) * 0.3
    return CodedRows(tuple(tiers), offset, step, mean, lowest_octave=-1), -(-(offset + 1) // 4) * 4


def random_rows(
    layout: CodedRows, size: int, batch: int, slots: int, generator: torch.Generator
) -> Tensor:
    """Any codes, scales from 1/2 to 2, any class: uint8 [batch, 1, slots, size]."""
    rows = torch.randint(0, 256, (batch, 1, slots, size), generator=generator, dtype=torch.uint8)
    scale = torch.randint(0, 16, (batch, 1, slots), generator=generator)
    kind = torch.randint(0, layout.classes, (batch, 1, slots), generator=generator)
    rows[..., layout.header] = (scale + (kind << layout.scale_bits)).to(torch.uint8)
    return rows


def exact(layout: CodedRows) -> CodedRows:
    """The same rows, decoded in fp64."""
    return CodedRows(
        layout.tiers,
        layout.header,
        layout.step.double(),
        layout.mean.double(),
        layout.lowest_octave,
    )


def error(output: Tensor, truth: Tensor) -> float:
    """Relative, NaN if there is any."""
    return float((output.double() - truth).norm() / truth.norm())
