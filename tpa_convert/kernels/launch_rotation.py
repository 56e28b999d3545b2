"""The Triton kernel that rotates pairs of features, and how it is launched."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import power_of_two, shares
from .start import Constants, start_kernel

PAIRS = 1024  # of a program: few enough that a short text has a program for many multiprocessors


@triton.jit
def rotate_rows(
    first,
    x,
    cosine,
    sine,
    output,
    rows,
    table_rows,
    heads,
    stride,
    PAIRS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`rotation.rotate` of ROWS of the `rows` of `x` [b, s, heads, 2 · PAIRS], whose positions are
    `stride` numbers apart; the `table_rows` of the tables are those of all positions of one
    sequence, or of each."""
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    pair = tl.arange(0, PADDED)[None, :]
    mask = (row < rows) & (pair < PAIRS)
    here, table = row * (2 * PAIRS) + pair, (row // heads) % table_rows * (2 * PAIRS) + pair
    x += row // heads * stride + row % heads * (2 * PAIRS) + pair
    real = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    imaginary = tl.load(x + PAIRS, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cosine + table, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sine + table, mask=mask, other=0.0).to(tl.float32)
    number = output.dtype.element_ty
    tl.store(output + here, (real * cos + imaginary * sin).to(number), mask=mask)
    cos = tl.load(cosine + table + PAIRS, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sine + table + PAIRS, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + here + PAIRS, (imaginary * cos + real * sin).to(number), mask=mask)


@triton.jit(do_not_specialize=["rows", "table_rows"])
def rotate_kernel(
    x,
    cosine,
    sine,
    output,
    rows,
    table_rows,
    heads,
    stride,
    PAIRS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`rotate_rows` of every program."""
    first = tl.program_id(0) * ROWS
    rotate_rows(
        first, x, cosine, sine, output, rows, table_rows, heads, stride, PAIRS, PADDED, ROWS
    )


def launch_rotation(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`rotation.rotate` of [b, s, j, 2 f] whose positions are equally far apart, their heads side
    by side; tables are contiguous."""
    batch, positions, heads, width = shape = x.shape
    output = x.new_empty(shape)
    if output.numel():
        types = x.dtype, cosine.dtype
        # Of a single position of each sequence, whose own stride says nothing, rows are sequences.
        stride = x.stride(1 if positions > 1 else 0)
        constants = rotation_constants(x.device, types, heads, width, stride)
        rows = batch * positions * heads
        grid = (shares(rows, constants.named["ROWS"]), 1, 1)
        tensors, numbers = (x, cosine, sine, output), (rows, len(cosine) * positions)
        start_kernel(rotate_kernel, grid, constants, tensors, numbers)
    return output


@functools.lru_cache(maxsize=64)
def rotation_constants(
    device: torch.device,
    types: tuple[torch.dtype, torch.dtype],
    heads: int,
    width: int,
    stride: int,
) -> Constants:
    """Of `rotate_kernel`, for so many heads of such a width, at positions `stride` numbers apart.

    Args:
        types: of these and of cosines.
    """
    return Constants(device, {"num_warps": 4}, (heads, stride), **rotated_rows(width))


def rotated_rows(width: int) -> dict[str, int]:
    """What `rotate_rows` is compiled for."""
    padded = power_of_two(width // 2, 1, 1 << 30)
    return {"PAIRS": width // 2, "PADDED": padded, "ROWS": max(1, PAIRS // padded)}
