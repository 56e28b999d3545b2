"""How the encoding kernel is launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .encode_reference import CodeTables
from .quantise import encode_kernel

NUMBERS = 512  # in the registers of a warp; rows within one need no barriers


def launch_encode(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor]:
    """Headers uint8 [n] and codes uint8 [n, c] of [n, c], any stride from token to token."""
    header = x.new_empty(x.shape[:1], dtype=torch.uint8)
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    _launch(x, tables, header, codes, None, None, None)
    return header, codes


def launch_straight(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled codes [n, c], what was not clipped, bool [n, c], and classes int64 [n]."""
    scaled = x.new_empty(x.shape)
    inside = x.new_empty(x.shape, dtype=torch.bool)
    label = x.new_empty(x.shape[:1], dtype=torch.int64)
    _launch(x, tables, None, None, scaled, inside, label)
    return scaled, inside, label


def _launch(x: Tensor, tables: CodeTables, *outputs: Tensor | None) -> None:
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    if not rows:
        return
    padded = triton.next_power_of_2(width)
    at_once = max(1, NUMBERS // padded)
    encode_kernel[(triton.cdiv(rows, at_once),)](
        x,
        *(table.contiguous() for table in tables[:5]),
        *outputs,
        rows,
        x.stride(0),
        width,
        float(tables.lowest_octave),
        CLASSES=len(tables.mean),
        SCALE_BITS=tables.scale_bits,
        STRAIGHT=outputs[0] is None,
        ROWS=at_once,
        WIDTH=padded,
        num_warps=min(16, max(1, padded // NUMBERS)),
    )
