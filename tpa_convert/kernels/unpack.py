"""Codes to half-precision numbers without conversions, for Triton kernels.

Rows are read as 16-bit words, so that two tokens or two neighbouring words stand in one register,
as the matrix unit takes fp16 numbers; see `places.py` for what becomes of their fields.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .places import FIELDS


@triton.constexpr_function
def _instructions(bits, field):
    """PTX that makes a pair of fp16 numbers of one field of a pair of words."""
    shift, place = FIELDS[bits][field]
    mask = (((1 << bits) - 1) << place) * 0x10001
    if shift == 0:
        return f"lop3.b32 $0, $1, {mask:#x}, 0x3c003c00, 0xea;"  # (word & mask) | 1.0
    operation = "shl" if shift > 0 else "shr"
    return (
        f"{{ .reg .b32 shifted; {operation}.b32 shifted, $1, {abs(shift)}; "
        f"lop3.b32 $0, shifted, {mask:#x}, 0x3c003c00, 0xea; }}"
    )


@triton.constexpr_function
def _place(bits, field):
    return FIELDS[bits][field][1]


@triton.jit
def unpack(words, FIELD: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """A field of int16 `words` as fp16 numbers in [1, 2), of the same shape."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            _instructions(BITS, FIELD), "=r,r", [words], tl.float16, is_pure=True, pack=2
        )
    code = (words.to(tl.int32) >> (FIELD * BITS)) & ((1 << BITS) - 1)
    number = (code << _place(BITS, FIELD)) | 0x3C00
    return number.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def unpack_wide(
    words, FIELD: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """COUNT fields side by side, [T, COUNT * SIZE], of words [T, SIZE]."""
    if COUNT == 1:
        return unpack(words, FIELD, BITS, ASSEMBLY)
    else:
        a = unpack_wide(words, FIELD, COUNT // 2, BITS, ASSEMBLY)
        b = unpack_wide(words, FIELD + COUNT // 2, COUNT // 2, BITS, ASSEMBLY)
        joined = tl.permute(tl.join(a, b), (0, 2, 1))
        return tl.reshape(joined, (words.shape[0], COUNT * words.shape[1]))
