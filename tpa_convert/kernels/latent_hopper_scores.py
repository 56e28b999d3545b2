"""What a consumer of `latent_hopper.py` does with rebuilt keys: rotates them and multiplies them
with queries. All of it is that of one group of four warps.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .latent import NEVER

SPANS = gl.constexpr(2)
PAIRS_OF_SPAN = gl.constexpr(64)
IN_LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
QUERIES = gl.constexpr(gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0]))
PAIRS_OF_KEYS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
UNIT = gl.constexpr(2.0**-9)  # of whole numbers, so that they are not too large for fp16


@gluon.constexpr_function
def copied(element, threads):
    """Layout of rows that are copied, 16 bytes a thread, so many threads for each."""
    numbers = 128 // element.primitive_bitwidth
    return gl.BlockedLayout([1, numbers], [32 // threads, threads], [4, 1], [1, 0])


@gluon.jit
def attended_to(tile, begin, stop, mask, T: gl.constexpr):
    """Whether any of a tile's slots is."""
    first = tile * (2 * T)
    found = (first < stop) & (first + 2 * T > begin)
    if mask is not None:
        slot = first + gl.arange(0, 2 * T, IN_LINE)
        inside = (slot >= begin) & (slot < stop)
        value = gl.load(mask + slot, mask=inside, other=0)
        if mask.dtype.element_ty.is_floating():
            inside = inside & (value.to(gl.float32) > NEVER)
        else:
            inside = inside & (value != 0)
        found = found & (gl.max(inside.to(gl.int32), 0) > 0)
    return found


@gluon.jit
def load_queries(
    Q,
    query,
    unit,
    stride_h,
    stride_s,
    heads,
    positions,
    GROUPS: gl.constexpr,
    BLOCKS: gl.constexpr,
    PAIRS: gl.constexpr,
    PADDED: gl.constexpr,
    HEADS: gl.constexpr,
):
    """Queries [4 · 2 · blocks of pairs, C, pairs] of the halves of all spans, zero where a pair is
    of another head: for each block of pairs and each span the real parts of both halves, then the
    imaginary ones. Where keys come in units, queries are taken times them."""
    LOW: gl.constexpr = 8 if PADDED > 8 else PADDED
    AT_ONCE: gl.constexpr = HEADS // 2
    shared = heads // GROUPS
    per_half = AT_ONCE * shared * positions
    in_half = gl.arange(0, Q.shape[1], gl.SliceLayout(1, QUERIES))
    pair = gl.arange(0, Q.shape[2], gl.SliceLayout(0, QUERIES))
    pair_head = pair // LOW % AT_ONCE
    in_head = pair // (LOW * AT_ONCE) * LOW + pair % LOW
    for half in gl.static_range(2 * SPANS):
        column = half * per_half + in_half
        head = column // positions
        inside = (in_half < per_half) & (column < heads * positions)
        used = (in_head < PAIRS) & (half * AT_ONCE + pair_head < GROUPS)
        mine = (head // shared - half * AT_ONCE)[:, None] == pair_head[None, :]
        mine = mine & inside[:, None] & used[None, :]
        at = query + (head * stride_h + column % positions * stride_s)[:, None] + in_head[None, :]
        for block in range(BLOCKS):
            index = block * 8 + half // 2 * 4 + half % 2
            real = gl.load(at + block * PAIRS, mask=mine, other=0.0)
            imaginary = gl.load(at + (BLOCKS + block) * PAIRS, mask=mine, other=0.0)
            if unit is not None:
                in_span = pair // (LOW * AT_ONCE) * (LOW * HEADS) + pair % (LOW * AT_ONCE)
                in_span += half % 2 * (LOW * AT_ONCE)
                units = gl.load(unit + (block * SPANS + half // 2) * PAIRS_OF_SPAN + in_span)
                if Q.dtype == gl.float16:
                    units = units / UNIT
                units = units[None, :]
                real = (real.to(gl.float32) * units).to(Q.dtype)
                imaginary = (imaginary.to(gl.float32) * units).to(Q.dtype)
            Q.index(index).store(real)
            Q.index(index + 2).store(imaginary)


@gluon.jit
def whole_rows(first, offset):
    """Pointers to rows; groups of warps do not know by themselves that they are whole words."""
    rows = first + offset
    return gl.multiple_of(rows, [16] * len(rows.shape))


@gluon.jit
def load_row(rows, first, pair, PAIRS: gl.constexpr, PADDED: gl.constexpr):
    """Cosines, or sines, of PAIRS pairs from a `first` on, and zeros behind them."""
    if PADDED == PAIRS:
        return gl.load(rows + first + pair)
    else:
        inside, rows = gl.broadcast(pair < PAIRS, rows)
        return gl.load(rows + (first + pair), mask=inside, other=0.0)


@gluon.jit
def add_scores(scores, keys, Q, index, cos, sin, HEADS: gl.constexpr):
    """Adds what a span's keys [T, 128] in one block of pairs, real parts first, give to the scores
    of its two halves of heads."""
    T: gl.constexpr = keys.shape[0]
    HIGH: gl.constexpr = cos.shape[1]
    LOW: gl.constexpr = cos.shape[2]
    if keys.dtype == gl.int32:
        keys = keys.to(gl.float32)
        if Q.dtype == gl.float16:
            keys = keys * UNIT
    real, imaginary = gl.split(gl.permute(gl.reshape(keys, [T, 2, PAIRS_OF_SPAN]), [0, 2, 1]))
    a = gl.convert_layout(real, PAIRS_OF_KEYS, assert_trivial=True)
    b = gl.convert_layout(imaginary, PAIRS_OF_KEYS, assert_trivial=True)
    # In the type of the source, which rotates its keys in it too.
    a = gl.reshape(a.to(Q.dtype), [T, HIGH, HEADS, LOW])
    b = gl.reshape(b.to(Q.dtype), [T, HIGH, HEADS, LOW])
    c = gl.expand_dims(cos, 2)
    d = gl.expand_dims(sin, 2)
    real = a * c + b * -d  # there is no negative sign in products of bf16
    imaginary = b * c + a * d
    first, second = scores
    one, other = halves_of_heads(real)
    first = mma_v2(one, queries_of(Q, index), first)
    second = mma_v2(other, queries_of(Q, index + 1), second)
    one, other = halves_of_heads(imaginary)
    first = mma_v2(one, queries_of(Q, index + 2), first)
    second = mma_v2(other, queries_of(Q, index + 3), second)
    return first, second


@gluon.jit
def halves_of_heads(keys):
    """The keys [T, pairs] of the first and of the second half of heads [T, high, heads, low]."""
    T: gl.constexpr = keys.shape[0]
    HIGH: gl.constexpr = keys.shape[1]
    EACH: gl.constexpr = keys.shape[2] * keys.shape[3] // 2
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    one, other = gl.split(gl.permute(gl.reshape(keys, [T, HIGH, 2, EACH]), [0, 1, 3, 2]))
    one = gl.convert_layout(gl.reshape(one, [T, HIGH * EACH]), LEFT, assert_trivial=True)
    other = gl.convert_layout(gl.reshape(other, [T, HIGH * EACH]), LEFT, assert_trivial=True)
    return one, other


@gluon.jit
def queries_of(Q, index):
    return Q.index(index).permute((1, 0)).load(gl.DotOperandLayout(1, SCORES, 2))


@gluon.jit
def side_by_side(one, other):
    """Scores [T, columns] of both spans' halves of heads."""
    a, b = one
    c, d = other
    found = gl.permute(gl.join(gl.join(a, c), gl.join(b, d)), [0, 2, 3, 1])
    return gl.reshape(found, [a.shape[0], 4 * a.shape[1]])


@gluon.jit
def columns_of(
    LAYOUT: gl.constexpr,
    ALL: gl.constexpr,
    per_half,
    count,
):
    """The query of each of ALL columns, padded in each half of a span, and whether it is one."""
    PER_HALF: gl.constexpr = ALL // (2 * SPANS)
    index = gl.arange(0, ALL, LAYOUT)
    column = index // PER_HALF * per_half + index % PER_HALF
    return column, (index % PER_HALF < per_half) & (column < count)
