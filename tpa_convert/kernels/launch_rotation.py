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


@triton.jit(do_not_specialize=["rows"])
def rotate_kernel(
    x,
    cosine,
    sine,
    output,
    rows,
    heads,
    x_batch,
    x_head,
    x_position,
    output_batch,
    output_head,
    output_position,
    table_batch,
    table_position,
    PAIRS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`rotation.rotate` of the `rows` of one sequence, which are its heads position by position."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, PADDED)[None, :]
    mask = (row < rows)[:, None] & (pair < PAIRS)
    head, position = (row % heads).to(tl.int64)[:, None], (row // heads).to(tl.int64)[:, None]
    source = x + batch * x_batch + head * x_head + position * x_position + pair
    table = batch * table_batch + position * table_position + pair
    real = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    imaginary = tl.load(source + PAIRS, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cosine + table, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sine + table, mask=mask, other=0.0).to(tl.float32)
    there = output + batch * output_batch + head * output_head + position * output_position + pair
    number = output.dtype.element_ty
    tl.store(there, (real * cos + imaginary * sin).to(number), mask=mask)
    cos = tl.load(cosine + table + PAIRS, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sine + table + PAIRS, mask=mask, other=0.0).to(tl.float32)
    tl.store(there + PAIRS, (imaginary * cos + real * sin).to(number), mask=mask)


def launch_rotation(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`rotation.rotate`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if cosine.stride(-1) != 1 or sine.stride() != cosine.stride():
        cosine, sine = cosine.contiguous(), sine.contiguous()
    batch, heads, positions, width = x.shape
    output = torch.empty_like(x)
    rows = heads * positions
    if not x.numel():
        return output
    constants = rotation_constants(x.device, (x.dtype, cosine.dtype), width // 2)
    numbers = (
        rows,
        heads,
        *x.stride()[:3],
        *output.stride()[:3],
        cosine.stride(0) if cosine.shape[0] > 1 else 0,
        cosine.stride(2),
    )
    grid = (shares(rows, constants.named["ROWS"]), batch, 1)
    start_kernel(rotate_kernel, grid, constants, (x, cosine, sine, output), numbers)
    return output


@functools.lru_cache(maxsize=64)
def rotation_constants(
    device: torch.device, types: tuple[torch.dtype, torch.dtype], pairs: int
) -> Constants:
    """Of `rotate_kernel`, for heads of so many pairs and cosines of these types."""
    padded = power_of_two(pairs, 1, 1 << 30)
    rows = max(1, PAIRS // padded)
    return Constants(device, {"num_warps": 4}, PAIRS=pairs, PADDED=padded, ROWS=rows)
