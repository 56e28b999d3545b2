"""Random layers with latent keys, for the tests of their kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpa_convert.kernels.latent_reference import decode_latent
from tpa_convert.kernels.latent_tables import KeyMap, LatentTables, Rows, latent_tables
from tpa_convert.kernels.rows import CodedRows

from .kernel_cases import bounds, exact, poison, random_layout, random_rows


class LatentCase(NamedTuple):
    """A layer and what it has cached: arguments of `decode_latent`, and how to find the truth.

    Attributes:
        coded: how rows become numbers, of keys and values; None for numbers.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    cosine: Tensor
    sine: Tensor
    tables: LatentTables
    key_map: KeyMap
    coded: tuple[CodedRows, CodedRows] | None
    predicted: bool
    start: Tensor
    end: Tensor

    def call(self) -> tuple[Any, ...]:
        return self[:6]

    def truth(self, **settings: Any) -> Tensor:
        """In fp64, between the bounds unless others are given."""
        if self.coded is None:
            components = [x[:, 0].double() for x in (self.keys, self.values)]
            classes = None
        else:
            rows = self.keys[:, 0], self.values[:, 0]
            components, classes = [], []
            for layout, of_part in zip(self.coded, rows, strict=True):
                components.append(exact(layout).numbers(of_part))
                classes.append((of_part[..., layout.header] >> layout.scale_bits).double())
        bounds = {"start": self.start, "end": self.end}
        return decode_latent(
            self.query.double(),
            tuple(components),
            classes,
            self.key_map,
            self.cosine,
            self.sine,
            predicted=self.predicted,
            **bounds | settings,
        )


def random_case(
    *,
    shape: tuple[int, int, int] = (4, 2, 16),
    codes: tuple[list[list[tuple[int, int]]], list[tuple[int, int]]] | None,
    widths: tuple[list[int], int] = ([20], 12),
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
        codes: (bits, components) of the keys, block by block of rotary pairs, and of the values;
            None for numbers of `widths`.
        norm: of keys, "head" or "all".
        shared_table: one table of cosines for all sequences.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    heads, groups, head_dim = shape
    start, end = bounds(batch, slots, generator)
    end = torch.maximum(end, start + positions)
    coded = None
    if codes is not None:
        of_keys, of_values = codes
        widths = [sum(n for _, n in block) for block in of_keys], sum(n for _, n in of_values)
        layouts, parts, cached = [], [], []
        for runs in ([run for block in of_keys for run in block], of_values):
            layout, size = random_layout(runs, 2, generator)
            layout.mean.zero_()  # is part of the maps
            layouts.append(layout)
            bits = torch.tensor([b for b, n in runs for _ in range(n)])
            reach = (2.0**bits - 1) / 2
            parts.append(Rows(layout.tiers, layout.header, reach, layout.step, -1))
            cached.append(random_rows(layout, size, batch, slots, generator))
        coded = layouts[0], layouts[1]
    else:
        cached = [
            poison(random(batch, 1, slots, w), start, end) for w in (sum(widths[0]), widths[1])
        ]
        parts = [numbers(sum(widths[0]), random(1)), numbers(widths[1], random(1))]
    together = norm == "all"
    norms: list[Any] = [None, None]
    if norm is not None:
        sizes = (groups, head_dim) if together else (head_dim,)
        norms = [random(*sizes).abs() + 0.5, random(*sizes)]
    blocks = len(widths[0])
    key_map = KeyMap(
        random(groups, head_dim // blocks, sum(widths[0])) / sum(widths[0]) ** 0.5,
        widths[0],
        random(groups, head_dim),
        random(groups, head_dim) if coded is not None else None,
        *norms,
        1e-6,
        together,
    )
    key_map = KeyMap(*(x.to(device) if isinstance(x, Tensor) else x for x in key_map))
    parts = [x._replace(reach=x.reach.to(device), step=x.step.to(device)) for x in parts]
    angle = 3 * random(1 if shared_table else batch, slots, head_dim // 2)
    return LatentCase(
        random(batch, heads, positions, head_dim).to(device, dtype),
        *(x.to(device, x.dtype if codes is not None else dtype) for x in cached),
        angle.cos().to(device, dtype),
        angle.sin().to(device, dtype),
        latent_tables(*parts, key_map, dtype, predicted),
        key_map,
        None if coded is None else tuple(layout_on(x, device) for x in coded),
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
