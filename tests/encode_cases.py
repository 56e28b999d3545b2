"""Random components and tables of codes for the tests of the encoding kernel, and what is true."""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_convert.kernels.encode_reference import CodeTables


def random_tables(width: int, classes: int, generator: torch.Generator) -> CodeTables:
    """Components of spreads from 0.1 to 10; classes beyond the first have far means."""
    spread = 10 ** (2 * torch.rand(width, generator=generator) - 1)
    mean = 20 * torch.randn(classes, width, generator=generator) * spread
    mean[0] *= 0.01
    bits = torch.randint(1, 9, (width,), generator=generator).float()
    importance = torch.rand(width, generator=generator) / spread.square()
    return CodeTables(
        mean, 3 * spread / torch.exp2(bits), spread, importance, (torch.exp2(bits) - 1) / 2
    )


def random_components(rows: int, tables: CodeTables, generator: torch.Generator) -> Tensor:
    """Tokens of any class, from nearly constant ones to ones far beyond their spread."""
    classes, width = tables.mean.shape
    size = 10 ** (3 * torch.rand(rows, 1, generator=generator) - 2)
    noise = torch.randn(rows, width, generator=generator) * tables.spread * size
    kind = torch.randint(0, classes, (rows,), generator=generator)
    return tables.mean[kind] + noise


def double(tables: CodeTables) -> CodeTables:
    return CodeTables(*(x.double() for x in tables[:5]), tables.lowest_octave)


def size_and_label(header: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor]:
    """Scale times step [n, c] and class [n] that headers mean."""
    index = (header & (2**tables.scale_bits - 1)).double()
    scale = torch.exp2(index / 8 + tables.lowest_octave)
    return scale[:, None] * tables.step.double(), (header >> tables.scale_bits).long()


def weighted_error(x: Tensor, header: Tensor, tables: CodeTables) -> Tensor:
    """Least error [n] that codes under given headers leave."""
    size, label = size_and_label(header, tables)
    centred = x.double() - tables.mean.double()[label]
    code = (centred / size + tables.reach).clamp_min(0).minimum(2 * tables.reach).round()
    error = centred - size * (code - tables.reach)
    return (error.square() * tables.importance).sum(-1)


def distance(x: Tensor, label: Tensor, tables: CodeTables) -> Tensor:
    """From the mean of a class, in the importance metric [n]."""
    return ((x.double() - tables.mean.double()[label]).square() * tables.importance).sum(-1)
