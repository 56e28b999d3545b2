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

Rotation = tuple[Tensor, Tensor, Tensor]
"""Queries [b, s, h, d] and the tables that rotate them, see `rotation.rotate`; contiguous."""
NUMBERS = 512  # in the registers of a warp; rows within one need no barriers


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


def launch_rows(
    x: Tensor, codes: RowCodes, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of bytes, uint8 [n, bytes], scaled codes with the class behind them, in whole words:
    [n, `whole_words(c + 1)`], and rotated queries."""
    numbers, places, *header = codes
    count, width = x.shape
    features = x.new_empty((count, whole_words(width + 1)))
    packed = x.new_empty((count, places.shape[1]), dtype=torch.uint8)
    outputs = None, None, features, None, None, packed
    return packed, features, _launch("rows", x, numbers, outputs, places, header, rotation)


def _launch(
    kind: str,
    x: Tensor,
    numbers: Tensor,
    outputs: tuple[Tensor | None, ...],
    places: Tensor | None,
    header: Sequence[int],
    rotation: Rotation | None = None,
) -> Tensor | None:
    """Fills the outputs of `encode_kernel`; gives rotated queries.

    Args:
        kind: tells which outputs there are.
        header: where it is, and the lowest octave.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    count = len(x)
    query = cosine = sine = rotated = types = None
    heads = head_dim = query_rows = table_rows = 0
    if rotation is not None:
        query, cosine, sine = rotation
        rotated = torch.empty_like(query)
        batch, positions, heads, head_dim = query.shape
        query_rows, table_rows = batch * positions * heads, len(cosine) * positions
        types = query.dtype, cosine.dtype
    if count:
        constants = encode_constants(
            x.device,
            kind,
            x.dtype,
            x.stride(0),
            numbers.shape,
            None if places is None else places.shape,
            *header,
            types,
            heads,
            head_dim,
        )
        tensors = x, numbers, *outputs, places, query, cosine, sine, rotated
        coders, rotators = constants.named["ROWS"], constants.named["QUERIES"]
        grid = (shares(count, coders) + shares(query_rows, rotators), 1, 1)
        row_bytes = 0 if places is None else places.shape[1]
        rows = count, query_rows, table_rows, 0, row_bytes
        start_kernel(encode_kernel, grid, constants, tensors, rows)
    return rotated


@functools.lru_cache(maxsize=1024)
def encode_constants(
    device: torch.device,
    kind: str,
    dtype: torch.dtype,
    stride: int,
    numbers: tuple[int, int],
    places: tuple[int, int] | None,
    header_at: int,
    lowest_octave: int,
    types: tuple[torch.dtype, torch.dtype] | None,
    heads: int,
    head_dim: int,
) -> Constants:
    """Of `encode_kernel`, for components in `dtype` that are `stride` apart from token to token.

    Args:
        kind: of outputs: `codes`, `straight` or `rows`.
        numbers, places: sizes; see `RowCodes`.
        types: of queries that are rotated and of cosines, None where there are none.
        heads, head_dim: of the queries.
    """
    (rows_of_numbers, width), row_bytes = numbers, 0 if places is None else places[1]
    classes, padded = rows_of_numbers - 4, power_of_two(width, 1, 1 << 30)
    scaled_stride = whole_words(width + 1) if kind == "rows" else width
    pairs, padded_pairs, at_once = rotated_rows(head_dim).values()
    return Constants(
        device,
        {"num_warps": min(16, max(1, padded // NUMBERS))},
        (stride, scaled_stride, width, row_bytes, header_at, float(lowest_octave), heads),
        CLASSES=classes,
        SCALE_BITS=scale_bits(classes),
        ROWS=max(1, NUMBERS // padded),
        WIDTH=padded,
        BYTES=power_of_two(row_bytes, 1, 1 << 30),
        FEATURES=FEATURES,
        PAIRS=pairs,
        PADDED=padded_pairs,
        QUERIES=at_once,
    )
