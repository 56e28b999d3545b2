"""What the kernels of `products.py` are launched with."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import power_of_two, shares
from .products import product_kernel, projections_kernel
from .rows import FEATURES
from .start import Constants

SEVERAL_ROWS = 16  # of a program, if there is more than one
# Columns and numbers of these at a time, and warps: for a single row, whose program holds all that
# it reads in registers, and for more.
SINGLE = 4, 2048, 4
SEVERAL = 16, 256, 4
STAGES = 3

Launch = tuple[Any, tuple[int, int, int], Constants]
"""A kernel, its grid and constants."""


@functools.lru_cache(maxsize=1024)
def product_launch(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    width: int,
    size: int,
    biased: bool,
    groups: int = 1,
    heads: int = 1,
    taken: bool = False,
) -> Launch:
    """Of `product_kernel`.

    Args:
        width: of rows and of matrices, in whole words.
        size: of what comes out.
        biased: whether there is a bias.
        groups, heads: that have a matrix each, and rows of a group that belong to one token.
        taken: whether the product is taken off what is there.
    """
    program = shape_of(rows, width)
    grid = shares(size, program["BLOCK"]), shares(rows, program["ROWS"]), groups
    numbers = width // FEATURES, size, groups * heads * size, heads
    named = {"TAKEN": taken, **program, "PRECISION": precision(dtype)}
    return product_kernel, grid, Constants(device, options(rows), numbers, **named)


@functools.lru_cache(maxsize=1024)
def projections_launch(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    width: int,
    sizes: tuple[int, int, int],
    biased: tuple[bool, bool, bool],
) -> Launch:
    """Of `projections_kernel`; see `product_launch`."""
    program = shape_of(rows, width)
    programs = sum(shares(size, program["BLOCK"]) for size in sizes)
    named = {**program, "PRECISION": precision(dtype)}
    constants = Constants(device, options(rows), (width // FEATURES, *sizes), **named)
    return projections_kernel, (programs, shares(rows, program["ROWS"]), 1), constants


class MapLaunches(NamedTuple):
    """What follows attention, by the names in `latent_tables.OutputMap` and `launch_latent`.

    Attributes:
        kernels: as `start.Calls` takes them.
        parts: shapes and types of what stands between them.
        numbers: of their arguments.
    """

    kernels: list[tuple[Any, ...]]
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]]
    numbers: dict[str, int]


def map_launches(
    query: Tensor, features: tuple[int, ...], size: int, offset: bool, biased: bool
) -> MapLaunches:
    """Of heads made of features [groups, rows, n], and of the output projection.

    Args:
        query: [b, h, 1, d].
        size: of what comes out.
        offset, biased: whether there is an offset of heads, and a bias.
    """
    (batch, heads, _, head_dim), (groups, rows, width) = query.shape, features
    place, whole = (query.device, query.dtype), heads * head_dim
    gauge = product_launch(*place, rows, width, head_dim, offset, groups, heads // groups)
    project = product_launch(*place, batch, whole, size, biased)
    of_gauge = {"x": "features", "weight": "gauge", "bias": "gauge_offset", "output": "heads"}
    of_output = {"x": "heads", "weight": "projection", "bias": "projection_bias"}
    return MapLaunches(
        [
            (*gauge, of_gauge | {"rows": "group_rows"}),
            (*project, of_output | {"rows": "tokens"}),
        ],
        {"features": (features, query.dtype), "heads": ((batch, whole), query.dtype)},
        {"group_rows": rows, "tokens": batch},
    )


def shape_of(rows: int, width: int) -> dict[str, int]:
    """Of a program."""
    block, chunk, _ = SINGLE if rows == 1 else SEVERAL
    at_once = 1 if rows == 1 else SEVERAL_ROWS
    return {"ROWS": at_once, "BLOCK": block, "CHUNK": power_of_two(width, 16, chunk)}


def options(rows: int) -> dict[str, int]:
    return {"num_warps": (SINGLE if rows == 1 else SEVERAL)[2], "num_stages": STAGES}


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
