"""What the producer of `latent_hopper.py` does: it takes rows of keys apart. All of it is that of
one group of four warps.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
)

from .gluon_names import copy_to_shared, reinterpret, synchronize
from .latent import numbers_of
from .latent_hopper_scores import IN_LINE, SPANS, attended_to, copied

WORDS = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))
EVERY_BYTE = gl.constexpr(0x01010101)
SIGNS = gl.constexpr(-0x7F7F7F80)  # the highest bit of every byte


@gluon.jit
def store_codes(X, words, one, other):
    """Codes less their centres, of words [T, pairs] and the two items of each pair, to where
    products read them."""
    T: gl.constexpr = X.shape[0]
    ITEMS: gl.constexpr = X.shape[1] // 4
    if X.dtype == gl.int8:
        codes = gl.join(codes_of(words, one), codes_of(words, other))
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([T, ITEMS], gl.int32)
        codes = gl.reshape(codes, [T, ITEMS])
        reinterpret(X, gl.int32, [T, ITEMS], LAYOUT).store(codes)
    else:
        a = gl.reshape(numbers_of(words, one, X.dtype), [T, ITEMS // 2, 4])
        b = gl.reshape(numbers_of(words, other, X.dtype), [T, ITEMS // 2, 4])
        X.store(gl.reshape(gl.permute(gl.join(a, b), [0, 1, 3, 2]), [T, 4 * ITEMS]))


@gluon.jit
def codes_of(words, item):
    """Four codes of each word, less their centres: twice what the mask leaves, less the mask."""
    # Found with 128 more, so that no byte takes from its neighbour.
    turn = ((item >> 16) - 1) & 31
    keep = (item >> 24) * EVERY_BYTE
    words = words.to(gl.uint32, bitcast=True)
    turned = words >> turn.to(gl.uint32)[None, :]
    turned |= words << ((32 - turn) & 31).to(gl.uint32)[None, :]
    codes = turned.to(gl.int32, bitcast=True) & (2 * keep)[None, :]
    return (codes + (SIGNS - keep)[None, :]) ^ SIGNS


@gluon.jit
def produce(
    ring,
    keys,
    values,
    items,
    weight,
    mask,
    begin,
    stop,
    length,
    stride_t,
    value_stride_t,
    header_v,
    chunk_count,
    STAGES: gl.constexpr,
    KEPT: gl.constexpr,
):
    """Fills the ring: codes in a chunk of places, of both blocks of a tile, and weights. A chunk is
    handed over when the weights of the next are on their way. Weights that are kept are loaded for
    the first tile only."""
    X, W, full, empty = ring
    TILE: gl.constexpr = X.shape[1]
    CHUNK: gl.constexpr = X.shape[2]
    ROWS: gl.constexpr = W.shape[1]
    ITEMS: gl.constexpr = CHUNK // 4
    COPIED: gl.constexpr = copied(W.dtype, 4)
    of_item = items + gl.arange(0, ITEMS // 2, gl.SliceLayout(0, WORDS)) * 2
    of_weight = (gl.arange(0, ROWS, gl.SliceLayout(1, COPIED)) * CHUNK)[:, None]
    of_weight = of_weight + gl.arange(0, CHUNK, gl.SliceLayout(0, COPIED))[None, :]
    in_tile = gl.arange(0, TILE, gl.SliceLayout(1, WORDS))
    n = 0
    for tile in range(gl.program_id(0), gl.cdiv(length, TILE), gl.num_programs(0)):
        if attended_to(tile, begin, stop, mask, TILE // 2):
            # Reading slots that nothing attends to is cheaper than asking which they are.
            base = tile * TILE
            rows = keys + base.to(gl.int64) * stride_t
            rows += (gl.minimum(in_tile, length - 1 - base) * stride_t)[:, None]
            one, other = gl.load(of_item), gl.load(of_item + 1)  # of the same word
            words = gl.load(rows + (one & 0xFFFF)[None, :])
            at = of_item + gl.minimum(1, chunk_count - 1) * ITEMS
            next_one, next_other = gl.load(at), gl.load(at + 1)
            later = base + gl.num_programs(0) * TILE
            bring_closer(keys, later, length, stride_t, 0, stride_t, TILE)
            bring_closer(values, later, length, value_stride_t, header_v // 4, 1, TILE)
            for chunk in range(chunk_count):
                stage = n % STAGES
                mbarrier.wait(empty.index(stage), n // STAGES % 2 ^ 1)
                if (KEPT == 0) | (n < chunk_count):
                    of_chunk = weight + chunk * (SPANS * ROWS * CHUNK) + of_weight
                    to = SPANS * (chunk if KEPT else stage)
                    for span in gl.static_range(SPANS):
                        copy_to_shared(W.index(to + span), of_chunk + span * (ROWS * CHUNK))
                async_copy.commit_group()
                store_codes(X.index(stage), words, one, other)
                async_copy.wait_group(1)
                fence_async_shared()  # waits for loads too: the next ones come behind it
                words = gl.load(rows + (next_one & 0xFFFF)[None, :])
                one, other = next_one, next_other
                at = of_item + gl.minimum(chunk + 2, chunk_count - 1) * ITEMS
                next_one, next_other = gl.load(at), gl.load(at + 1)
                synchronize()
                mbarrier.arrive(full.index((n + STAGES - 1) % STAGES), count=1, pred=chunk > 0)
                n += 1
            async_copy.wait_group(0)
            fence_async_shared()
            synchronize()
            mbarrier.arrive(full.index((n + STAGES - 1) % STAGES), count=1)


@gluon.jit
def bring_closer(rows, first, length, stride_t, word, count, TILE: gl.constexpr):
    """Has the memory of L2 fetch `count` words from one of each row of a tile, for another tile's
    turn."""
    LINE: gl.constexpr = 32  # words
    slot = gl.minimum(first + gl.arange(0, TILE, IN_LINE), length - 1)
    rows = rows + (slot.to(gl.int64) * stride_t + word)
    for i in range(0, count, LINE):
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [rows + i],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
