"""What `latent_sums_hopper.py` multiplies: codes in registers, and weights that are scaled in
shared memory."""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_names import reinterpret
from .shared_hopper import load_word

SLOTS = gl.constexpr(32)  # at a time


@gluon.jit
def in_place(item):
    """Masks of an item's codes where they lie in a word's bytes."""
    keep = (item >> 24) * 0x01010101
    turn = (item >> 16) & 31
    return gl.inline_asm_elementwise(
        "shf.l.wrap.b32 $0, $1, $1, $2;",
        "=r,r,r",
        [keep, turn],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def hold(codes, never):
    """Keeps the registers of codes up to here: they would be stored, were `never` not 0."""
    never, codes = gl.broadcast(never, codes)
    gl.inline_asm_elementwise(
        """{
        .reg .pred ever;
        setp.ne.s32 ever, $2, 0;
        @ever st.shared.v4.b32 [global_smem], {$10, $11, $12, $13};
        mov.b32 $0, 0;
        mov.b32 $1, 0;
        }""",
        "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r",
        [never, codes],
        dtype=gl.int8,
        is_pure=False,
        pack=8,
    )


@gluon.jit
def codes_of(words, first, second, SUMS: gl.constexpr):
    """Codes [places, 16 slots] of words [warps, 32 slots, pairs], twice, for products."""
    W: gl.constexpr = words.shape[0]
    P: gl.constexpr = words.shape[2]
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    first = gl.expand_dims(first & 0x00FF00FF, 1)
    second = gl.expand_dims(second & 0x00FF00FF, 1)
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $8, $9, 0x5410;
        prmt.b32 b, $8, $9, 0x7632;
        prmt.b32 c, $8, $9, 0x6521;
        prmt.b32 d, $8, $9, 0x0703;
        and.b32 $0, a, $10;
        and.b32 $1, b, $10;
        and.b32 $2, c, $10;
        and.b32 $3, d, $10;
        and.b32 $4, a, $12;
        and.b32 $5, b, $12;
        and.b32 $6, c, $12;
        and.b32 $7, d, $12;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        [words, first, second],
        dtype=(gl.float16,) * 8,
        is_pure=True,
        pack=2,
    )
    one = gl.join(gl.join(a, b), gl.join(c, d))
    other = gl.join(gl.join(e, f), gl.join(g, h))
    codes = gl.join(one, other)  # [W, slots, pairs, 2 · 2 places, 2]
    codes = gl.reshape(codes, [W, 4, 2, 2, 2, P // 8, 8, 2, 2, 2])
    codes = gl.permute(codes, [5, 9, 8, 0, 7, 6, 3, 1, 4, 2])
    codes, more = gl.split(gl.reshape(codes, [8 * P * W, SLOTS // 2, 2]))
    return gl.convert_layout(codes, LEFT), gl.convert_layout(more, LEFT)


@gluon.jit
def scale_weights(W, first, of_sums, of_terms, of_fours, begins):
    """Weights of the block that begins so many bytes behind where the ring does, times a factor of
    each column, to where products read them; returns their sums [columns].

    Args:
        of_sums: what all sums are relative to, [columns].
        of_terms, of_fours: addresses of what weights are relative to, [columns], and of four words
            of them, [columns, fours].
    """
    C: gl.constexpr = of_fours.shape[0]
    of_block = load_word(of_terms + begins).to(gl.float32, bitcast=True)
    factor = gl.exp2(of_block - of_sums).to(gl.float16)
    factor, address = gl.broadcast(gl.expand_dims(factor, 1), of_fours + begins)
    a, b, c, d, added = gl.inline_asm_elementwise(
        """{
        .reg .b32 twice;
        .reg .b16 even, odd;
        .reg .f32 x, y;
        mov.b32 twice, {$6, $6};
        ld.shared.v4.b32 {$0, $1, $2, $3}, [$5];
        mul.rn.f16x2 $0, $0, twice;
        mul.rn.f16x2 $1, $1, twice;
        mul.rn.f16x2 $2, $2, twice;
        mul.rn.f16x2 $3, $3, twice;
        mov.b32 {even, odd}, $0;
        cvt.f32.f16 x, even;
        cvt.f32.f16 y, odd;
        add.f32 $4, x, y;
        mov.b32 {even, odd}, $1;
        cvt.f32.f16 x, even;
        cvt.f32.f16 y, odd;
        add.f32 x, x, y;
        add.f32 $4, $4, x;
        mov.b32 {even, odd}, $2;
        cvt.f32.f16 x, even;
        cvt.f32.f16 y, odd;
        add.f32 x, x, y;
        add.f32 $4, $4, x;
        mov.b32 {even, odd}, $3;
        cvt.f32.f16 x, even;
        cvt.f32.f16 y, odd;
        add.f32 x, x, y;
        add.f32 $4, $4, x;
        }""",
        "=&r,=&r,=&r,=&r,=&f,r,h",
        [address, factor],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.float32),
        is_pure=False,
        pack=1,
    )
    SHARES: gl.constexpr = of_fours.shape[1] // 4  # of 32 slots
    AS_WORDS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, 8], gl.int32)
    for half in gl.static_range(2):  # of eight slots that are one thread's
        pairs = gl.join(a, b) if half == 0 else gl.join(c, d)
        pairs = gl.permute(gl.reshape(pairs, [C, SHARES, 4, 2]), [0, 3, 2, 1])
        if SHARES == 1:
            to = reinterpret(W.index(first + half), gl.int32, [C, 8], AS_WORDS)
            to.store(gl.reshape(pairs, [C, 8]))
        else:
            one, other = gl.split(gl.reshape(pairs, [C, 8, 2]))
            reinterpret(W.index(first + half), gl.int32, [C, 8], AS_WORDS).store(one)
            reinterpret(W.index(first + 2 + half), gl.int32, [C, 8], AS_WORDS).store(other)
    return gl.sum(added, 1)
