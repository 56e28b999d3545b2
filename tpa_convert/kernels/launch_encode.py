"""How the encoding kernel is launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .encode_reference import CodeTables, RowTables
from .quantise import encode_kernel, pack_kernel

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
        size = min(256, triton.next_power_of_2(row_bytes))
        at_once = min(PACKED // size, triton.next_power_of_2(count))
        pack_kernel[(triton.cdiv(count, at_once), triton.cdiv(row_bytes, size))](
            codes,
            header,
            packed,
            *(table.contiguous() for table in rows[:3]),
            rows.header,
            count,
            x.shape[1],
            row_bytes,
            ROWS=at_once,
            BYTES=size,
            num_warps=4,
        )
    return packed, scaled, label


def _launch(x: Tensor, tables: CodeTables, outputs: dict[str, Tensor]) -> None:
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    if not rows:
        return
    padded = triton.next_power_of_2(width)
    at_once = max(1, NUMBERS // padded)
    encode_kernel[(triton.cdiv(rows, at_once),)](
        x,
        *(table.contiguous() for table in tables[:5]),
        *(outputs.get(name) for name in OUTPUTS),
        rows,
        x.stride(0),
        width,
        float(tables.lowest_octave),
        CLASSES=len(tables.mean),
        SCALE_BITS=tables.scale_bits,
        ROWS=at_once,
        WIDTH=padded,
        num_warps=min(16, max(1, padded // NUMBERS)),
    )
