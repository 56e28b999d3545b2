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
EIGHT = gl.constexpr(8)  # numbers of 16 bits that a thread loads at once
UNIT = gl.constexpr(2.0**-9)  # of whole numbers, so that they are not too large for fp16


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
def load_offsets(
    O,  # noqa: E741
    query,
    offset,
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
    """What cosines, and sines, of slots are taken times to give what offsets of keys add to scores,
    for each span [2, columns, pairs of a head], and the same of what the second class adds."""
    for span in gl.static_range(SPANS):
        load_offsets_of(
            O,
            span,
            query,
            offset,
            stride_h,
            stride_s,
            heads,
            positions,
            GROUPS,
            BLOCKS,
            PAIRS,
            PADDED,
            HEADS,
        )


@gluon.jit
def load_offsets_of(
    O,  # noqa: E741
    span: gl.constexpr,
    query,
    offset,
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
    LOW: gl.constexpr = 8 if PADDED > 8 else PADDED
    C: gl.constexpr = O.shape[1] // 2  # of a half of a span
    shared = heads // GROUPS
    per_half = HEADS // 2 * shared * positions
    index = gl.arange(0, O.shape[1], gl.SliceLayout(1, QUERIES))
    pair = gl.arange(0, O.shape[2], gl.SliceLayout(0, QUERIES))
    column = (span * 2 + index // C) * per_half + index % C
    head = column // positions
    inside = (index % C < per_half) & (column < heads * positions)
    inside = inside[:, None] & (pair < BLOCKS * PAIRS)[None, :]
    at = query + (head * stride_h + column % positions * stride_s)[:, None] + pair[None, :]
    real = gl.load(at, mask=inside, other=0.0).to(gl.float32)
    imaginary = gl.load(at + BLOCKS * PAIRS, mask=inside, other=0.0).to(gl.float32)
    group = head // shared
    of_head = group // HEADS * (2 * PAIRS_OF_SPAN) + group % HEADS * LOW
    of_pair = pair // PAIRS * (SPANS * 2 * PAIRS_OF_SPAN) + pair % LOW
    of_pair += pair % PAIRS // LOW * (HEADS * LOW)
    at = offset + of_head[:, None] + of_pair[None, :]
    for label in gl.static_range(2):
        a = gl.load(at, mask=inside, other=0.0)
        b = gl.load(at + PAIRS_OF_SPAN, mask=inside, other=0.0)
        O.index(span * 4 + 2 * label).store((real * a + imaginary * b).to(O.dtype))
        O.index(span * 4 + 2 * label + 1).store((imaginary * a - real * b).to(O.dtype))
        at += BLOCKS * (SPANS * 2 * PAIRS_OF_SPAN)


@gluon.jit
def scores_of_offsets(
    O,  # noqa: E741
    index,
    cosine,
    sine,
    last,
    stride_t,
    scale,
    label,
    any_class,
    PAIRS: gl.constexpr,  # of a head
):
    """What offsets of keys add to the scores of a block of slots, of the rows of cosines and sines
    from its first on: [T, C] for both halves of a span, to be taken times `scale`."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, EIGHT)
    T: gl.constexpr = 64
    slot = gl.minimum(gl.arange(0, T, gl.SliceLayout(1, LEFT)), last)
    pair = gl.arange(0, O.shape[2], gl.SliceLayout(0, LEFT))
    of_row = (slot * stride_t)[:, None]
    cosine = whole_rows(cosine, of_row)
    sine = whole_rows(sine, of_row)
    cos = load_row(cosine, 0, pair[None, :], PAIRS, O.shape[2]).to(O.dtype)
    sin = load_row(sine, 0, pair[None, :], PAIRS, O.shape[2]).to(O.dtype)
    scores = gl.full([T, O.shape[1]], 0.0, gl.float32, SCORES)
    scores = mma_v2(cos, offsets_of(O, index), scores)
    scores = mma_v2(sin, offsets_of(O, index + 1), scores)
    if any_class > 0:
        more = gl.full([T, O.shape[1]], 0.0, gl.float32, SCORES)
        more = mma_v2(cos, offsets_of(O, index + 2), more)
        more = mma_v2(sin, offsets_of(O, index + 3), more)
        scores += more * label[:, None]
    scores /= scale[:, None]
    one, other = gl.split(gl.permute(gl.reshape(scores, [T, 2, O.shape[1] // 2]), [0, 2, 1]))
    one = gl.convert_layout(one, SCORES, assert_trivial=True)
    return one, gl.convert_layout(other, SCORES, assert_trivial=True)


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
def offsets_of(O, index):  # noqa: E741
    return O.index(index).permute((1, 0)).load(gl.DotOperandLayout(1, SCORES, EIGHT))


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
def write_weights(
    scores,
    span: gl.constexpr,
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
    """Weights of a block of slots for a span, and its terms; see `latent_weights_kernel`."""
    one, other = scores
    T: gl.constexpr = one.shape[0]
    PER_HALF: gl.constexpr = one.shape[1]
    scores = gl.reshape(gl.permute(gl.join(one, other), [0, 2, 1]), [T, 2 * PER_HALF])
    LAYOUT: gl.constexpr = scores.type.layout
    SLOTS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    in_half = gl.arange(0, 2 * PER_HALF, gl.SliceLayout(0, LAYOUT)) % PER_HALF
    half = gl.arange(0, 2 * PER_HALF, gl.SliceLayout(0, LAYOUT)) // PER_HALF
    column = (span * 2 + half) * per_half + in_half
    inside = (in_half < per_half) & (column < heads * positions) & inside_block
    slot = first_slot + gl.arange(0, T, SLOTS)
    valid = (slot >= begin) & (slot < stop)
    scores = scores * gl.convert_layout(scales[0], SLOTS)[:, None]
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
    of_values = gl.full([2 * PER_HALF], 0.0, gl.float32, gl.SliceLayout(0, LAYOUT))
    of_keys = of_values
    if any_class > 0:
        of_keys = gl.sum(weights * gl.convert_layout(labels[0], SLOTS)[:, None], 0)
        of_values = gl.sum(weights * gl.convert_layout(labels[1], SLOTS)[:, None], 0)
    gl.store(terms + column, highest, mask=inside)
    gl.store(terms + padded_columns + column, gl.sum(weights, 0), mask=inside)
    gl.store(terms + 2 * padded_columns + column, of_values, mask=inside)
    gl.store(terms + 3 * padded_columns + column, of_keys, mask=inside)
    # Slots of a column lie side by side.
    index = gl.arange(0, 2 * PER_HALF, gl.SliceLayout(0, OF_WEIGHTS))
    column = (span * 2 + index // PER_HALF) * per_half + index % PER_HALF
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
