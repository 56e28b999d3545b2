"""How the encoding kernel is launched."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .encode_reference import CodeTables, RowTables, scale_bits
from .launch import power_of_two, shares, types_of
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
    _launch(x, tables, (header, codes, None, None, None, None), x.shape[1])
    return header, codes


def launch_straight(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled codes [n, c], what was not clipped, bool [n, c], and classes int64 [n]."""
    scaled = x.new_empty(x.shape)
    inside = x.new_empty(x.shape, dtype=torch.bool)
    label = x.new_empty(x.shape[:1], dtype=torch.int64)
    _launch(x, tables, (None, None, scaled, inside, label, None), x.shape[1])
    return scaled, inside, label


def launch_rows(
    x: Tensor, tables: CodeTables, rows: RowTables, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of bytes, uint8 [n, bytes], scaled codes with the class behind them, in whole words:
    [n, `whole_words(c + 1)`], and rotated queries."""
    count, width = x.shape
    features = x.new_empty((count, whole_words(width + 1)))
    packed = x.new_empty((count, len(rows.bits)), dtype=torch.uint8)
    outputs = None, None, features, None, None, packed
    return packed, features, _launch(x, tables, outputs, features.shape[1], rows, rotation)


def _launch(
    x: Tensor,
    tables: CodeTables,
    outputs: tuple[Tensor | None, ...],
    stride: int,
    rows: RowTables | None = None,
    rotation: Rotation | None = None,
) -> Tensor | None:
    """Fills the outputs of `encode_kernel`, of which what is scaled has rows `stride` apart; gives
    rotated queries."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    count, width = x.shape
    *places, header_at = rows or (None, None, None, 0)
    query = cosine = sine = rotated = None
    heads = head_dim = query_rows = table_rows = 0
    if rotation is not None:
        query, cosine, sine = rotation
        rotated = torch.empty_like(query)
        batch, positions, heads, head_dim = query.shape
        query_rows, table_rows = batch * positions * heads, len(cosine) * positions
    if count:
        constants = encode_constants(
            x.device,
            types_of(x, *outputs, query, cosine),
            (width, x.stride(0), stride),
            len(tables.mean),
            0 if rows is None else len(rows.bits),
            header_at,
            tables.lowest_octave,
            (heads, head_dim),
        )
        tensors = (x, *tables[:5], *outputs, *places, query, cosine, sine, rotated)
        programs = shares(count, constants.named["ROWS"])
        programs += shares(query_rows, constants.named["QUERIES"])
        numbers = count, query_rows, table_rows
        start_kernel(encode_kernel, (programs, 1, 1), constants, tensors, numbers)
    return rotated


@functools.lru_cache(maxsize=256)
def encode_constants(
    device: torch.device,
    types: tuple[torch.dtype | None, ...],
    sizes: tuple[int, int, int],
    classes: int,
    row_bytes: int,
    header_at: int,
    lowest_octave: int,
    queries: tuple[int, int],
) -> Constants:
    """Of `encode_kernel`, for rows of `row_bytes`, or for none.

    Args:
        types: of components, of all outputs, of queries and of cosines.
        sizes: components of a token, and strides of components and of what is scaled.
        queries: how many of a token are rotated, and how wide.
    """
    (width, *strides), (heads, head_dim) = sizes, queries
    padded = power_of_two(width, 1, 1 << 30)
    pairs, padded_pairs, at_once = rotated_rows(head_dim).values()
    return Constants(
        device,
        {"num_warps": min(16, max(1, padded // NUMBERS))},
        (*strides, width, row_bytes, header_at, float(lowest_octave), heads),
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
