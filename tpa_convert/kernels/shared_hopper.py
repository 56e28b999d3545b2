"""Shared memory by address, for kernels in Gluon.

Gluon's descriptors of shared memory give tiles, not single words at addresses that are found at run
time. So these are instructions, in inline assembly, on addresses from where a program's shared
memory begins. That is the symbol `global_smem`, by which Triton's compiler calls it: an assembler
would refuse another. A kernel that uses it must allocate all that it uses of shared memory at once,
as its only allocation, and nothing that the compiler itself puts there may come; both show in what
it is compiled to, which tests look at.
"""

# mypy: disable-error-code="misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def shared_begin(nothing):
    """The address where shared memory begins, for each of some zeros."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [nothing], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def load_word(address):
    """What lies at addresses."""
    return gl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def start_copy(target, source, known):
    """Starts copies of 16 bytes, where known, to addresses from addresses in global memory, which
    are multiples of 16. The thread's next group of copies has them."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred known;
        setp.ne.s32 known, $3, 0;
        @known cp.async.cg.shared.global [$1], [$2], 16;
        mov.b32 $0, 0;
        }""",
        "=r,r,l,r",
        [target, source, known.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
