"""How the encoding kernel is launched."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .encode_reference import CodeTables, RowTables
from .launch import power_of_two, shares
from .quantise import encode_kernel
from .rows import FEATURES, whole_words
from .start import Constants, start_kernel

NUMBERS = 512  # in the registers of a warp; rows within one need no barriers


def launch_encode(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor]:
    """Headers uint8 [n] and codes uint8 [n, c] of [n, c], any stride from token to token."""
    header = x.new_empty(x.shape[:1], dtype=torch.uint8)
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    _launch(x, tables, header=header, codes=codes)
    return header, codes


def launch_straight(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled codes [n, c], what was not clipped, bool [n, c], and classes int64 [n]."""
    scaled = x.new_empty(x.shape)
    inside = x.new_empty(x.shape, dtype=torch.bool)
    label = x.new_empty(x.shape[:1], dtype=torch.int64)
    _launch(x, tables, scaled=scaled, inside=inside, label=label)
    return scaled, inside, label


def launch_rows(x: Tensor, tables: CodeTables, rows: RowTables) -> tuple[Tensor, Tensor]:
    """Rows of bytes, uint8 [n, bytes], and scaled codes with the class behind them, in whole words:
    [n, `whole_words(c + 1)`]."""
    count, width = x.shape
    features = x.new_empty((count, whole_words(width + 1)))
    packed = x.new_empty((count, rows.bits.shape[0]), dtype=torch.uint8)
    codes = x.new_empty((count, width), dtype=torch.uint8)
    _launch(x, tables, codes=codes, scaled=features, packed=packed, rows=rows)
    return packed, features


def _launch(
    x: Tensor,
    tables: CodeTables,
    header: Tensor | None = None,
    codes: Tensor | None = None,
    scaled: Tensor | None = None,
    inside: Tensor | None = None,
    label: Tensor | None = None,
    packed: Tensor | None = None,
    rows: RowTables | None = None,
) -> None:
    x = x if x.stride(-1) == 1 else x.contiguous()
    count, width = x.shape
    if not count:
        return
    *places, header_at = rows or (None, None, None, 0)
    row_bytes = 0 if packed is None else packed.shape[1]
    classes = tables.mean.shape[0]
    constants = encode_constants(x.device, width, classes, tables.scale_bits, row_bytes)
    arguments = (
        x,
        *tables[:5],
        header,
        codes,
        scaled,
        inside,
        label,
        packed,
        *places,
        count,
        x.stride(0),
        width if scaled is None else scaled.shape[1],
        width,
        row_bytes,
        header_at,
        float(tables.lowest_octave),
    )
    grid = (shares(count, constants.named["ROWS"]), 1, 1)
    start_kernel(encode_kernel, grid, constants, arguments)


@functools.lru_cache(maxsize=256)
def encode_constants(
    device: torch.device, width: int, classes: int, scale_bits: int, row_bytes: int
) -> Constants:
    """Of `encode_kernel`, for tokens of `width` components in rows of `row_bytes`, or in none."""
    padded = power_of_two(width, 1, 1 << 30)
    return Constants(
        device,
        {"num_warps": min(16, max(1, padded // NUMBERS))},
        CLASSES=classes,
        SCALE_BITS=scale_bits,
        ROWS=max(1, NUMBERS // padded),
        WIDTH=padded,
        BYTES=power_of_two(row_bytes, 1, 1 << 30),
        FEATURES=FEATURES,
    )
