"""How the encoding kernel is launched."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .encode_reference import CodeTables, RowTables
from .launch import power_of_two, shares
from .quantise import encode_kernel, pack_kernel
from .start import Constants, start_kernel

OUTPUTS = ("header", "codes", "scaled", "inside", "label")
PACKED = 1024  # bytes that a program packs
NUMBERS = 512  # in the registers of a warp; rows within one need no barriers


def launch_encode(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor]:
    """Headers uint8 [n] and codes uint8 [n, c] of [n, c], any stride from token to token."""
    header = x.new_empty(x.shape[:1], dtype=torch.uint8)
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    _launch(x, tables, {"header": header, "codes": codes})
    return header, codes


def launch_straight(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled codes [n, c], what was not clipped, bool [n, c], and classes int64 [n]."""
    scaled = x.new_empty(x.shape)
    inside = x.new_empty(x.shape, dtype=torch.bool)
    label = x.new_empty(x.shape[:1], dtype=torch.int64)
    _launch(x, tables, {"scaled": scaled, "inside": inside, "label": label})
    return scaled, inside, label


def launch_rows(x: Tensor, tables: CodeTables, rows: RowTables) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of bytes, uint8 [n, bytes], scaled codes [n, c] and classes int64 [n]."""
    header = x.new_empty(x.shape[:1], dtype=torch.uint8)
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    scaled = x.new_empty(x.shape)
    label = x.new_empty(x.shape[:1], dtype=torch.int64)
    _launch(x, tables, {"header": header, "codes": codes, "scaled": scaled, "label": label})
    count, row_bytes = len(x), len(rows.bits)
    packed = x.new_empty((count, row_bytes), dtype=torch.uint8)
    if count:
        size = power_of_two(row_bytes, 1, 256)
        at_once = power_of_two(count, 1, PACKED // size)
        grid = (shares(count, at_once), shares(row_bytes, size), 1)
        where = (table.contiguous() for table in rows[:3])
        arguments = codes, header, packed, *where, rows.header, count, x.shape[1], row_bytes
        start_kernel(pack_kernel, grid, pack_constants(x.device, at_once, size), arguments)
    return packed, scaled, label


def _launch(x: Tensor, tables: CodeTables, outputs: dict[str, Tensor]) -> None:
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    if not rows:
        return
    constants = encode_constants(x.device, width, len(tables.mean), tables.scale_bits)
    arguments = (
        x,
        *(table.contiguous() for table in tables[:5]),
        *(outputs.get(name) for name in OUTPUTS),
        rows,
        x.stride(0),
        width,
        float(tables.lowest_octave),
    )
    grid = (shares(rows, constants.named["ROWS"]), 1, 1)
    start_kernel(encode_kernel, grid, constants, arguments)


@functools.lru_cache(maxsize=256)
def encode_constants(device: torch.device, width: int, classes: int, scale_bits: int) -> Constants:
    """Of `encode_kernel`, for tokens of `width` components."""
    padded = power_of_two(width, 1, 1 << 30)
    return Constants(
        device,
        {"num_warps": min(16, max(1, padded // NUMBERS))},
        CLASSES=classes,
        SCALE_BITS=scale_bits,
        ROWS=max(1, NUMBERS // padded),
        WIDTH=padded,
    )


@functools.lru_cache(maxsize=256)
def pack_constants(device: torch.device, rows: int, size: int) -> Constants:
    """Of `pack_kernel`, for `rows` tokens of `size` bytes a program."""
    return Constants(device, {"num_warps": 4}, ROWS=rows, BYTES=size)
