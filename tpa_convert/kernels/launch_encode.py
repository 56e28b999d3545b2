"""How the encoding kernel is launched."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .encode_reference import CodeTables, RowCodes, numbers_of, scale_bits
from .launch import power_of_two, shares
from .launch_rotation import rotated_rows
from .quantise import encode_kernel
from .rows import FEATURES, whole_words
from .start import Constants, start_kernel

NUMBERS = 512  # in the registers of a warp; rows within one need no barriers
FEW = 64  # of a token of its own, which nothing but itself keeps a multiprocessor busy with


def launch_encode(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor]:
    """Headers uint8 [n] and codes uint8 [n, c] of [n, c], any stride from token to token."""
    header = x.new_empty(x.shape[:1], dtype=torch.uint8)
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    outputs = header, codes, None, None, None, None
    _launch("codes", x, numbers_of(tables), outputs, None, (0, tables.lowest_octave))
    return header, codes


def launch_straight(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled codes [n, c], what was not clipped, bool [n, c], and classes int64 [n]."""
    scaled = x.new_empty(x.shape)
    inside = x.new_empty(x.shape, dtype=torch.bool)
    label = x.new_empty(x.shape[:1], dtype=torch.int64)
    outputs = None, None, scaled, inside, label, None
    _launch("straight", x, numbers_of(tables), outputs, None, (0, tables.lowest_octave))
    return scaled, inside, label


def launch_rows(x: Tensor, codes: RowCodes) -> tuple[Tensor, Tensor]:
    """Rows of bytes, uint8 [n, bytes], and scaled codes with the class behind them, in whole words:
    [n, `whole_words(c + 1)`]."""
    numbers, places, *header = codes
    count, width = x.shape
    features = x.new_empty((count, whole_words(width + 1)))
    packed = x.new_empty((count, places.shape[1]), dtype=torch.uint8)
    outputs = None, None, features, None, None, packed
    _launch("rows", x, numbers, outputs, places, header)
    return packed, features


def _launch(
    kind: str,
    x: Tensor,
    numbers: Tensor,
    outputs: tuple[Tensor | None, ...],
    places: Tensor | None,
    header: Sequence[int],
) -> None:
    """Fills the outputs of `encode_kernel`.

    Args:
        kind: tells which outputs there are.
        header: where it is, and the lowest octave.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    count, width = x.shape
    if count:
        scaled_stride = whole_words(width + 1) if kind == "rows" else width
        constants = encode_constants(
            x.device,
            kind,
            x.dtype,
            x.stride(0),
            scaled_stride,
            numbers.shape,
            None if places is None else places.shape,
            *header,
            None,
            0,
            0,
        )
        tensors = x, numbers, *outputs, places, None, None, None, None
        grid = (shares(count, constants.named["ROWS"]), 1, 1)
        start_kernel(encode_kernel, grid, constants, tensors, (count, 0, 0, 0, 0, count))


def row_constants(
    device: torch.device,
    dtype: torch.dtype,
    codes: RowCodes,
    scaled_stride: int,
    types: tuple[torch.dtype, torch.dtype] | None = None,
    heads: int = 0,
    head_dim: int = 0,
    per_warp: int = NUMBERS,
) -> Constants:
    """`encode_constants` for rows of contiguous components."""
    numbers, places, *header = codes
    shapes = tuple(numbers.shape), tuple(places.shape)
    strides = numbers.shape[1], scaled_stride
    given = device, "rows", dtype, *strides, *shapes, *header, types, heads, head_dim
    return encode_constants(*given, per_warp)


@functools.lru_cache(maxsize=1024)
def encode_constants(
    device: torch.device,
    kind: str,
    dtype: torch.dtype,
    stride: int,
    scaled_stride: int,
    numbers: tuple[int, int],
    places: tuple[int, int] | None,
    header_at: int,
    lowest_octave: int,
    types: tuple[torch.dtype, torch.dtype] | None,
    heads: int,
    head_dim: int,
    per_warp: int = NUMBERS,
) -> Constants:
    """Of `encode_kernel`, for components in `dtype` that are `stride` apart from token to token, as
    scaled codes are `scaled_stride`.

    Args:
        kind: of outputs: `codes`, `straight` or `rows`.
        numbers, places: sizes; see `RowCodes`.
        types: of queries that are rotated and of cosines, None where there are none.
        heads, head_dim: of the queries.
        per_warp: numbers that a warp holds.
    """
    (rows_of_numbers, width), row_bytes = numbers, 0 if places is None else places[1]
    classes, padded = rows_of_numbers - 4, power_of_two(width, 1, 1 << 30)
    pairs, padded_pairs, at_once = rotated_rows(head_dim).values()
    return Constants(
        device,
        {"num_warps": min(16, max(1, padded // per_warp))},
        (stride, scaled_stride, width, row_bytes, header_at, float(lowest_octave), heads),
        CLASSES=classes,
        SCALE_BITS=scale_bits(classes),
        ROWS=max(1, per_warp // padded),
        WIDTH=padded,
        BYTES=power_of_two(row_bytes, 1, 1 << 30),
        FEATURES=FEATURES,
        PAIRS=pairs,
        PADDED=padded_pairs,
        QUERIES=at_once,
    )
