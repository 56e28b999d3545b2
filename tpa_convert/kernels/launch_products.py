"""What the kernels of `products.py` are launched with."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import all_shared_bytes, power_of_two, shares
from .products import product_kernel, projections_kernel
from .rows import FEATURES
from .start import Constants


class Program(NamedTuple):
    """Rows and columns of a program, numbers of these that it multiplies at a time, and how it is
    compiled."""

    rows: int
    columns: int
    chunk: int
    warps: int
    stages: int


# The last one is of any number of rows; that of a single row holds all that it reads in registers.
# Where shared memory is not enough for the others, they multiply fewer numbers at a time.
PROGRAMS = Program(1, 4, 2048, 4, 3), Program(16, 16, 256, 4, 3), Program(64, 32, 128, 4, 4)

TOGETHER = 2  # products of a kernel that have shared memory of their own: of `projections_kernel`

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
    program = program_of(rows, dtype, device)
    grid = shares(size, program.columns), shares(rows, program.rows), groups
    numbers = width // FEATURES, size, groups * heads * size, heads
    named = {"TAKEN": taken, **shape_of(program, width, dtype)}
    return product_kernel, grid, Constants(device, options(program), numbers, **named)


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
    program = program_of(rows, dtype, device)
    programs = sum(shares(size, program.columns) for size in sizes)
    named = shape_of(program, width, dtype)
    constants = Constants(device, options(program), (width // FEATURES, *sizes), **named)
    return projections_kernel, (programs, shares(rows, program.rows), 1), constants


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


def program_of(rows: int, dtype: torch.dtype, device: torch.device) -> Program:
    """The smallest for so many rows, within the shared memory of the device."""
    program = next((program for program in PROGRAMS if rows <= program.rows), PROGRAMS[-1])
    numbers = all_shared_bytes(device) // (TOGETHER * program.stages * dtype.itemsize)
    while program.rows > 1 and (program.rows + program.columns) * program.chunk > numbers:
        program = program._replace(chunk=program.chunk // 2)
    return program


def shape_of(program: Program, width: int, dtype: torch.dtype) -> dict[str, int | str]:
    """What kernels are compiled for."""
    return {
        "ROWS": program.rows,
        "BLOCK": program.columns,
        "CHUNK": power_of_two(width, 16, program.chunk),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def options(program: Program) -> dict[str, int]:
    return {"num_warps": program.warps, "num_stages": program.stages}
