"""Weights of coded latent keys as `latent.py` makes them, for Hopper's matrix unit.

Twelve warps share the work. One group of four, the *producer*, takes rows apart and loads weights
of keys into a ring in shared memory. Two others, the *consumers*, have a block of slots each:

    keys [T, 2 pairs] = components [T, w] · weightᵀ [w, 2 pairs]         both spans at once
    scores [T, C] += rotated keys [T, pairs] · queriesᵀ [pairs, C]       heads by halves of a span

The matrix unit works for one while the other rotates. Programs stay: each goes through tiles of two
blocks, so that queries and offsets of keys are brought to shared memory once.

This is written in Gluon, Triton's language of explicit layouts, where warps may differ: in plain
Triton all warps wait at every step for each other. Nothing computed is on the left of an
asynchronous product, as in `latent.py`.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .latent import AT_RUN_TIME, NEVER, load_header, numbers_of
from .split_kv import LOG2_E, slot_bounds, tanh

# Names of Triton 3.7 and later, and of 3.6.
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

WARPS = gl.constexpr(4)  # of a group
SPANS = gl.constexpr(2)
PAIRS_OF_SPAN = gl.constexpr(64)
REGISTERS_OF_CONSUMER = gl.constexpr(216)  # of a thread
REGISTERS_OF_PRODUCER = gl.constexpr(80)
IN_LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
WORDS = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0]))
COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread
QUERIES = gl.constexpr(gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0]))
OF_WEIGHTS = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
KEYS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
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
def produce(
    ring,
    keys,
    items,
    weight,
    mask,
    begin,
    stop,
    length,
    stride_t,
    chunk_count,
    STAGES: gl.constexpr,
):
    """Fills the ring: components of a chunk of places, of both blocks of a tile, and weights."""
    X, W, full, empty = ring
    T: gl.constexpr = X.shape[1]
    CHUNK: gl.constexpr = X.shape[2]
    ROWS: gl.constexpr = W.shape[1]
    ITEMS: gl.constexpr = CHUNK // 4
    of_item = items + gl.arange(0, ITEMS, gl.SliceLayout(0, WORDS))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, COPIED)) * CHUNK
    of_weight = row[:, None] + gl.arange(0, CHUNK, gl.SliceLayout(0, COPIED))[None, :]
    in_block = gl.arange(0, T, gl.SliceLayout(1, WORDS))
    n = 0
    for tile in range(gl.program_id(0), gl.cdiv(length, 2 * T), gl.num_programs(0)):
        if attended_to(tile, begin, stop, mask, T):
            # Reading slots that nothing attends to is cheaper than asking which they are.
            base = tile * (2 * T)
            rows = keys + base.to(gl.int64) * stride_t
            low = (gl.minimum(in_block, length - 1 - base) * stride_t)[:, None]
            high = (gl.minimum(in_block + T, length - 1 - base) * stride_t)[:, None]
            item = gl.load(of_item)
            words_low = gl.load(rows + (low + (item & 0xFFFF)[None, :]))
            words_high = gl.load(rows + (high + (item & 0xFFFF)[None, :]))
            for chunk in range(chunk_count):
                stage = n % STAGES
                mbarrier.wait(empty.index(stage), n // STAGES % 2 ^ 1)
                copy_to_shared(W.index(stage), weight + chunk * (ROWS * CHUNK) + of_weight)
                async_copy.commit_group()
                following = gl.load(of_item + (chunk + 1) * ITEMS)
                X.index(2 * stage).store(numbers_of(words_low, item, X.dtype))
                words_low = gl.load(rows + (low + (following & 0xFFFF)[None, :]))
                X.index(2 * stage + 1).store(numbers_of(words_high, item, X.dtype))
                words_high = gl.load(rows + (high + (following & 0xFFFF)[None, :]))
                item = following
                async_copy.wait_group(0)
                fence_async_shared()
                synchronize()
                mbarrier.arrive(full.index(stage), count=1)
                n += 1


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


@gluon.jit
def consume(
    me: gl.constexpr,
    ring,
    inputs,
    outputs,
    bounds,
    strides,
    numbers,
    factors,
    GROUPS: gl.constexpr,
    BLOCKS: gl.constexpr,
    PAIRS: gl.constexpr,
    PADDED: gl.constexpr,
    HEADS: gl.constexpr,
    MULTIPLE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Empties the ring: weights of the first or the second block of each tile."""
    Q, offsets, X, W, full, empty = ring
    keys, values, chunks, offset, cosine, sine = inputs
    weights_out, block_terms = outputs
    mask, begin, stop, window = bounds
    key_stride_t, value_stride_t, table_stride_t, table_stride_p = strides
    heads, positions, length, chunk_count, padded_columns, header_k, header_v = numbers
    scale, softcap, octave_k, octave_v = factors
    T: gl.constexpr = X.shape[1]
    LOW: gl.constexpr = 8 if PADDED > 8 else PADDED
    HIGH: gl.constexpr = PADDED // LOW
    SLOTS: gl.constexpr = gl.SliceLayout(1, PAIRS_OF_KEYS)
    # Cosines [T, high, low] serve all heads of a span: they are laid out as a head's keys are.
    a_span = gl.full([T, PAIRS_OF_SPAN], 0.0, Q.dtype, PAIRS_OF_KEYS)
    a_span = gl.reshape(a_span, [T, HIGH, HEADS, LOW])
    A_HEAD: gl.constexpr = gl.SliceLayout(2, a_span.type.layout)
    high = gl.arange(0, HIGH, gl.SliceLayout(0, gl.SliceLayout(2, A_HEAD)))
    low = gl.arange(0, LOW, gl.SliceLayout(0, gl.SliceLayout(1, A_HEAD)))
    pair = gl.expand_dims(high[None, :], 2) * LOW + gl.expand_dims(low[None, :], 1)
    in_block = gl.arange(0, T, gl.SliceLayout(1, gl.SliceLayout(2, A_HEAD)))
    zeros = gl.full([T, W.shape[1]], 0.0, gl.float32, KEYS)
    nothing = gl.full([T, Q.shape[1]], 0.0, gl.float32, SCORES)
    per_half = HEADS // 2 * (heads // GROUPS) * positions
    blocks = gl.cdiv(length, T)
    batch = gl.program_id(1)
    n = 0
    for tile in range(gl.program_id(0), gl.cdiv(length, 2 * T), gl.num_programs(0)):
        block = tile * 2 + me
        inside_block = block < blocks
        of_block = batch * blocks + block
        terms = block_terms + of_block * (4 * padded_columns)
        of_weights = weights_out + of_block.to(gl.int64) * (2 * padded_columns * T)
        if attended_to(tile, begin, stop, mask, T):
            base = gl.minimum(block * T, length - 1)
            last = length - 1 - base
            row = gl.minimum(gl.arange(0, T, SLOTS), last)
            rows = keys + base.to(gl.int64) * key_stride_t
            key_scale, key_class = load_header(rows, row * key_stride_t, octave_k, header_k)
            rows = values + base.to(gl.int64) * value_stride_t
            value_scale, value_class = load_header(rows, row * value_stride_t, octave_v, header_v)
            any_class = gl.max(gl.maximum(key_class, value_class), 0)  # hardly ever
            table = gl.expand_dims(gl.minimum(in_block, last)[:, None], 2) * table_stride_t
            table = base.to(gl.int64) * table_stride_t + table + pair * table_stride_p
            known = (pair < PAIRS) & (table >= 0)
            first = nothing, nothing
            second = nothing, nothing
            rebuilt = zeros
            for chunk in range(chunk_count):
                of_pairs = gl.load(chunks + chunk)
                at = table + of_pairs * PAIRS * table_stride_p
                cos = gl.load(cosine + at, mask=known, other=0.0).to(Q.dtype)
                sin = gl.load(sine + at, mask=known, other=0.0).to(Q.dtype)
                ends = gl.load(chunks + chunk + 1) > of_pairs
                stage = n % STAGES
                mbarrier.wait(full.index(stage), n // STAGES % 2)
                right = W.index(stage).permute((1, 0))
                product = warpgroup_mma(X.index(2 * stage + me), right, rebuilt, is_async=True)
                rebuilt = warpgroup_mma_wait(0, deps=(product,))
                synchronize()
                mbarrier.arrive(empty.index(stage), count=1)
                n += 1
                if ends:
                    one, other = gl.split(
                        gl.permute(gl.reshape(rebuilt, [T, SPANS, W.shape[1] // 2]), [0, 2, 1])
                    )
                    of_class = offset + (BLOCKS + of_pairs) * W.shape[1]
                    of_rows = key_scale, key_class, any_class, cos, sin
                    first = add_scores(
                        first, one, Q, offsets, of_pairs * 8, of_class, *of_rows, HEADS
                    )
                    of_class += W.shape[1] // 2
                    second = add_scores(
                        second, other, Q, offsets, of_pairs * 8 + 4, of_class, *of_rows, HEADS
                    )
                    rebuilt = zeros
            write_weights(
                (first, second),
                terms,
                of_weights,
                mask,
                block * T,
                begin,
                stop,
                (key_scale, value_scale),
                (key_class, value_class),
                any_class,
                heads,
                positions,
                per_half,
                padded_columns,
                inside_block,
                scale,
                softcap,
                window,
                MULTIPLE,
            )
        else:
            write_nothing(terms, of_weights, padded_columns, inside_block, T)


@gluon.jit(do_not_specialize=AT_RUN_TIME)
def latent_weights_on_hopper(
    query,
    keys,
    values,
    items,
    chunks,
    weight,
    offset,
    norm,
    cosine,
    sine,
    weights_out,
    block_terms,
    pages,
    start,
    end,
    mask,
    pages_stride_b,
    mask_stride_b,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_t,
    value_stride_b,
    value_stride_t,
    table_stride_b,
    table_stride_t,
    table_stride_p,
    heads,
    positions,
    length,
    chunk_count,
    padded_columns,
    scale,
    softcap,
    window,
    octave_k,
    octave_v,
    header_k,
    header_v,
    epsilon,
    GROUPS: gl.constexpr,
    BLOCKS: gl.constexpr,
    PAIRS: gl.constexpr,
    PADDED: gl.constexpr,
    HEADS: gl.constexpr,
    COLUMNS: gl.constexpr,  # of half of the heads of a span, padded
    CHUNK: gl.constexpr,
    BLOCK: gl.constexpr,
    MULTIPLE: gl.constexpr,
    STAGES: gl.constexpr,  # of the ring
):
    """`latent_weights_kernel` for keys without a norm, in two spans, in a cache in one piece. The
    grid is [programs of a sequence, b]."""
    gl.static_assert(norm is None and pages is None)
    DTYPE: gl.constexpr = query.dtype.element_ty
    ROWS: gl.constexpr = 2 * PAIRS_OF_SPAN * SPANS
    EACH: gl.constexpr = PAIRS_OF_SPAN // 2
    batch = gl.program_id(1)
    X = gl.allocate_shared_memory(
        DTYPE,
        [2 * STAGES, BLOCK, CHUNK],
        gl.NVMMASharedLayout.get_default_for([BLOCK, CHUNK], DTYPE),
    )
    W = gl.allocate_shared_memory(
        DTYPE, [STAGES, ROWS, CHUNK], gl.NVMMASharedLayout.get_default_for([ROWS, CHUNK], DTYPE)
    )
    Q = gl.allocate_shared_memory(
        DTYPE,
        [8 * BLOCKS, COLUMNS, EACH],
        gl.NVMMASharedLayout.get_default_for([COLUMNS, EACH], DTYPE),
    )
    offsets = gl.allocate_shared_memory(
        gl.float32, [4 * BLOCKS, PAIRS_OF_SPAN], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    load_queries(
        Q,
        query + batch.to(gl.int64) * query_stride_b,
        query_stride_h,
        query_stride_s,
        heads,
        positions,
        GROUPS,
        BLOCKS,
        PAIRS,
        PADDED,
        HEADS,
    )
    for part in range(4 * BLOCKS):
        pair = gl.arange(0, PAIRS_OF_SPAN, IN_LINE)
        offsets.index(part).store(gl.load(offset + part * PAIRS_OF_SPAN + pair))
    synchronize()

    begin, stop = slot_bounds(start, end, length, positions, window, batch)
    keys += batch.to(gl.int64) * key_stride_b
    values += batch.to(gl.int64) * value_stride_b
    table = batch.to(gl.int64) * table_stride_b
    if mask is not None:
        mask += batch.to(gl.int64) * mask_stride_b
    filled = X, W, full, empty
    ring = Q, offsets, X, W, full, empty
    inputs = keys, values, chunks, offset, cosine + table, sine + table
    outputs = weights_out, block_terms
    bounds = mask, begin, stop, window
    strides = key_stride_t, value_stride_t, table_stride_t, table_stride_p
    numbers = heads, positions, length, chunk_count, padded_columns, header_k, header_v
    factors = scale, softcap, octave_k, octave_v
    gl.warp_specialize(
        [
            (
                consume,
                (
                    0,
                    ring,
                    inputs,
                    outputs,
                    bounds,
                    strides,
                    numbers,
                    factors,
                    GROUPS,
                    BLOCKS,
                    PAIRS,
                    PADDED,
                    HEADS,
                    MULTIPLE,
                    STAGES,
                ),
            ),
            (
                consume,
                (
                    1,
                    ring,
                    inputs,
                    outputs,
                    bounds,
                    strides,
                    numbers,
                    factors,
                    GROUPS,
                    BLOCKS,
                    PAIRS,
                    PADDED,
                    HEADS,
                    MULTIPLE,
                    STAGES,
                ),
            ),
            (
                produce,
                (
                    filled,
                    keys,
                    items,
                    weight,
                    mask,
                    begin,
                    stop,
                    length,
                    key_stride_t,
                    chunk_count,
                    STAGES,
                ),
            ),
        ],
        [WARPS, WARPS],
        [REGISTERS_OF_CONSUMER, REGISTERS_OF_PRODUCER],
    )
