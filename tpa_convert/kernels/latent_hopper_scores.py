"""What a consumer of `latent_hopper.py` does with rebuilt keys: rotates them, multiplies them with
queries, and writes weights. All of it is that of one group of four warps.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .latent import NEVER
from .split_kv import LOG2_E, tanh

SPANS = gl.constexpr(2)
PAIRS_OF_SPAN = gl.constexpr(64)
IN_LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
QUERIES = gl.constexpr(gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0]))
OF_WEIGHTS = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
PAIRS_OF_KEYS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))


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
    imaginary ones."""
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
            Q.index(index).store(real)
            Q.index(index + 2).store(imaginary)


@gluon.jit
def add_scores(
    scores,
    keys,
    Q,
    offsets,
    index,
    of_class,
    scale,
    label,
    any_class,
    cos,
    sin,
    HEADS: gl.constexpr,
):
    """Adds what a span's keys [T, 128] in one block of pairs, real parts first, give to the scores
    of its two halves of heads."""
    real, imaginary = gl.split(gl.permute(gl.reshape(keys, [keys.shape[0], 2, 64]), [0, 2, 1]))
    a = gl.convert_layout(real, PAIRS_OF_KEYS, assert_trivial=True)
    b = gl.convert_layout(imaginary, PAIRS_OF_KEYS, assert_trivial=True)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, PAIRS_OF_KEYS)
    a = a * scale[:, None] + offsets.index(index // 2).load(COLUMNS)[None, :]
    b = b * scale[:, None] + offsets.index(index // 2 + 1).load(COLUMNS)[None, :]
    if any_class > 0:
        pair = gl.arange(0, PAIRS_OF_SPAN, COLUMNS)
        a += label[:, None] * gl.load(of_class + pair)[None, :]
        b += label[:, None] * gl.load(of_class + PAIRS_OF_SPAN + pair)[None, :]
    # In the type of the source, which rotates its keys in it too.
    HIGH: gl.constexpr = cos.shape[1]
    LOW: gl.constexpr = cos.shape[2]
    a = gl.reshape(a.to(Q.dtype), [a.shape[0], HIGH, HEADS, LOW])
    b = gl.reshape(b.to(Q.dtype), [b.shape[0], HIGH, HEADS, LOW])
    c = gl.expand_dims(cos, 2)
    d = gl.expand_dims(sin, 2)
    real = a * c - b * d
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
def write_weights(
    scores,
    terms,
    of_weights,
    mask,
    first_slot,
    begin,
    stop,
    scales,
    labels,
    any_class,
    heads,
    positions,
    per_half,
    padded_columns,
    inside_block,
    scale,
    softcap,
    window,
    MULTIPLE: gl.constexpr,
):
    """Weights of a block of slots, and its terms; see `latent_weights_kernel`."""
    a, b = scores[0]
    c, d = scores[1]
    T: gl.constexpr = a.shape[0]
    PER_HALF: gl.constexpr = a.shape[1]
    scores = gl.permute(gl.join(gl.join(a, c), gl.join(b, d)), [0, 2, 3, 1])
    scores = gl.reshape(scores, [T, 4 * PER_HALF])  # halves of the first span, of the second
    LAYOUT: gl.constexpr = scores.type.layout
    SLOTS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    in_half = gl.arange(0, 4 * PER_HALF, gl.SliceLayout(0, LAYOUT)) % PER_HALF
    half = gl.arange(0, 4 * PER_HALF, gl.SliceLayout(0, LAYOUT)) // PER_HALF
    column = half * per_half + in_half
    inside = (in_half < per_half) & (column < heads * positions) & inside_block
    slot = first_slot + gl.arange(0, T, SLOTS)
    valid = (slot >= begin) & (slot < stop)
    if softcap is not None:
        scores = softcap * tanh(scores * (scale / softcap)) * LOG2_E
    else:
        scores = scores * (scale * LOG2_E)
    if mask is not None:
        if mask.dtype.element_ty.is_floating():
            bias = gl.load(mask + slot, mask=valid, other=0).to(gl.float32)
            valid = valid & (bias > NEVER)
            scores += gl.where(valid, bias * LOG2_E, 0.0)[:, None]
        else:
            valid = valid & (gl.load(mask + slot, mask=valid, other=0) != 0)
    attended = valid[:, None] & inside[None, :]
    if MULTIPLE:  # several query positions, each with its own last slot
        own = (stop - positions + column % positions)[None, :]
        attended = attended & (slot[:, None] <= own)
        if window is not None:
            attended = attended & (slot[:, None] > own - window)
    scores = gl.where(attended, scores, float("-inf"))
    highest = gl.ceil(gl.max(scores, 0))
    weights = gl.exp2(scores - gl.where(highest == float("-inf"), 0.0, highest)[None, :])
    of_values = gl.full([4 * PER_HALF], 0.0, gl.float32, gl.SliceLayout(0, LAYOUT))
    of_keys = of_values
    if any_class > 0:
        of_keys = gl.sum(weights * gl.convert_layout(labels[0], SLOTS)[:, None], 0)
        of_values = gl.sum(weights * gl.convert_layout(labels[1], SLOTS)[:, None], 0)
    gl.store(terms + column, highest, mask=inside)
    gl.store(terms + padded_columns + column, gl.sum(weights, 0), mask=inside)
    gl.store(terms + 2 * padded_columns + column, of_values, mask=inside)
    gl.store(terms + 3 * padded_columns + column, of_keys, mask=inside)
    # Slots of a column lie side by side.
    index = gl.arange(0, 4 * PER_HALF, gl.SliceLayout(0, OF_WEIGHTS))
    column = index // PER_HALF * per_half + index % PER_HALF
    inside = (index % PER_HALF < per_half) & (column < heads * positions) & inside_block
    t = gl.arange(0, T, gl.SliceLayout(1, OF_WEIGHTS))
    of_weights += (column * T)[None, :] + t[:, None]
    inside = inside[None, :] & (t >= 0)[:, None]
    for part in gl.static_range(2):  # times the scales of keys, and of values
        scaled = weights * gl.convert_layout(scales[part], SLOTS)[:, None]
        scaled = gl.convert_layout(scaled.to(of_weights.dtype.element_ty), OF_WEIGHTS)
        gl.store(of_weights + part * padded_columns * T, scaled, mask=inside)


@gluon.jit
def write_nothing(terms, of_weights, padded_columns, inside_block, T: gl.constexpr):
    """Weights and terms of a block that nothing attends to."""
    for i in range(0, padded_columns, 32):
        column = i + gl.arange(0, 32, IN_LINE)
        inside = (column < padded_columns) & inside_block
        gl.store(terms + column, gl.full([32], float("-inf"), gl.float32, IN_LINE), mask=inside)
        nothing = gl.full([32], 0.0, gl.float32, IN_LINE)
        for term in gl.static_range(1, 4):
            gl.store(terms + term * padded_columns + column, nothing, mask=inside)
    for i in range(0, 2 * padded_columns * T, 1024):
        at = i + gl.arange(0, 1024, IN_LINE)
        nothing = gl.full([1024], 0.0, of_weights.dtype.element_ty, IN_LINE)
        gl.store(of_weights + at, nothing, mask=(at < 2 * padded_columns * T) & inside_block)
