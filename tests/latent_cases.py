"""Random layers with coded latent keys, for the tests of their kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpa_convert.kernels.latent_reference import decode_latent
from tpa_convert.kernels.latent_tables import KeyMap, LatentTables, Rows, latent_tables
from tpa_convert.kernels.rows import CodedRows

from .kernel_cases import bounds, exact, random_layout, random_rows


class LatentCase(NamedTuple):
    """A layer and what it has cached: arguments of `decode_latent`, and how to find the truth.

    Attributes:
        coded: how rows become numbers, of keys and values.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    cosine: Tensor
    sine: Tensor
    tables: LatentTables
    key_map: KeyMap
    coded: tuple[CodedRows, CodedRows]
    predicted: bool
    start: Tensor
    end: Tensor

    def call(self) -> tuple[Any, ...]:
        return self[:6]

    def truth(self, **settings: Any) -> Tensor:
        """In fp64, between the bounds unless others are given."""
        components, classes = [], []
        for layout, rows in zip(self.coded, (self.keys, self.values), strict=True):
            components.append(exact(layout).numbers(rows[:, 0]))
            classes.append((rows[:, 0, :, layout.header] >> layout.scale_bits).double())
        bounds = {"start": self.start, "end": self.end}
        return decode_latent(
            self.query.double(),
            tuple(components),
            tuple(classes),
            self.key_map,
            self.cosine,
            self.sine,
            predicted=self.predicted,
            **bounds | settings,
        )


def random_case(
    *,
    shape: tuple[int, int, int] = (4, 2, 16),
    codes: tuple[list[list[tuple[int, int]]], list[tuple[int, int]]],
    align: int = 4,
    slots: int = 150,
    positions: int = 1,
    batch: int = 2,
    norm: str | None = None,
    predicted: bool = True,
    shared_table: bool = False,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    seed: int = 0,
) -> LatentCase:
    """A random layer of `shape` (query heads, key/value heads, head dim).

    Args:
        codes: (bits, components) of the keys, block by block of rotary pairs, and of the values.
        align: what the bytes of each tier are padded to a multiple of.
        norm: of keys, "head" or "all".
        shared_table: one table of cosines for all sequences.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    heads, groups, head_dim = shape
    start, end = bounds(batch, slots, generator)
    end = torch.maximum(end, start + positions)
    of_keys, of_values = codes
    widths = [sum(n for _, n in block) for block in of_keys]
    coded, parts, cached = [], [], []
    for runs in ([run for block in of_keys for run in block], of_values):
        layout, size = random_layout(runs, 2, generator, align)
        layout.mean.zero_()  # is part of the maps
        coded.append(layout)
        parts.append(Rows(layout.tiers, layout.header, layout.step.to(device), -1))
        cached.append(random_rows(layout, size, batch, slots, generator).to(device))
    together = norm == "all"
    norms: list[Any] = [None, None]
    if norm is not None:
        sizes = (groups, head_dim) if together else (head_dim,)
        norms = [random(*sizes).abs() + 0.5, random(*sizes)]
    key_map = KeyMap(
        random(groups, head_dim // len(widths), sum(widths)) / sum(widths) ** 0.5,
        widths,
        random(groups, head_dim),
        random(groups, head_dim),
        *norms,
        1e-6,
        together,
    )
    key_map = KeyMap(*(x.to(device) if isinstance(x, Tensor) else x for x in key_map))
    angle = 3 * random(1 if shared_table else batch, slots, head_dim // 2)
    return LatentCase(
        random(batch, heads, positions, head_dim).to(device, dtype),
        *cached,
        angle.cos().to(device, dtype),
        angle.sin().to(device, dtype),
        latent_tables(*parts, key_map, dtype, predicted),
        key_map,
        tuple(layout_on(x, device) for x in coded),
        predicted,
        start.to(device),
        end.to(device),
    )


def layout_on(layout: CodedRows, device: Any) -> CodedRows:
    return CodedRows(
        layout.tiers,
        layout.header,
        layout.step.to(device),
        layout.mean.to(device),
        layout.lowest_octave,
    )
