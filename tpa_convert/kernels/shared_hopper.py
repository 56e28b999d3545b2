"""Shared memory by address and bulk copies to it, for kernels in Gluon.

Gluon's descriptors of shared memory give tiles, not single words at addresses that are found at run
time, and its bulk copies want descriptors that the host encodes for every tensor. So these are
instructions, in inline assembly, on addresses from where a program's shared memory begins. That is
the symbol `global_smem`, by which Triton's compiler calls it: an assembler would refuse another. A
kernel that uses it must allocate all that it uses of shared memory at once, as its only allocation,
and nothing that the compiler itself puts there may come; both show in the size that it is compiled
with, which tests look at.
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
def load_four_words(address):
    """What lies at addresses that are multiples of 16, [..., 2, 2]."""
    a, b, c, d = gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        [address],
        dtype=(gl.int32,) * 4,
        is_pure=False,
        pack=1,
    )
    return gl.join(gl.join(a, c), gl.join(b, d))


@gluon.jit
def start_barriers(barrier, known):
    """Makes barriers of one arrival at addresses, where known; all threads must meet afterwards."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred known;
        setp.ne.s32 known, $2, 0;
        @known mbarrier.init.shared::cta.b64 [$1], 1;
        fence.mbarrier_init.release.cluster;
        fence.proxy.async.shared::cta;
        mov.b32 $0, 0;
        }""",
        "=r,r,r",
        [barrier, known.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def expect(barrier, size):
    """Arrives at barriers that so many bytes will come to, where these are more than none."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred some;
        setp.gt.s32 some, $2, 0;
        @some mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;
        mov.b32 $0, 0;
        }""",
        "=r,r,r",
        [barrier, size],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def start_copy(target, source, size, barrier):
    """Starts copies of so many bytes, where more than none, that barriers count. Addresses, in
    global memory too, and sizes are multiples of 16."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred some;
        setp.gt.s32 some, $3, 0;
        @some cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
            [$1], [$2], $3, [$4];
        mov.b32 $0, 0;
        }""",
        "=r,r,l,r,r",
        [target, source, size, barrier],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def wait(barrier, phase):
    """Waits until all bytes of a phase, 0 and 1 in turn, have come."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred done;
        AGAIN:
        mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;
        @!done bra AGAIN;
        mov.b32 $0, 0;
        }""",
        "=r,r,r",
        [barrier, phase],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
