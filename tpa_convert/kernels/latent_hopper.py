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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .latent import AT_RUN_TIME, load_header, numbers_of
from .latent_hopper_scores import (
    IN_LINE,
    PAIRS_OF_KEYS,
    PAIRS_OF_SPAN,
    SCORES,
    SPANS,
    add_scores,
    attended_to,
    load_queries,
    write_nothing,
    write_weights,
)
from .split_kv import slot_bounds

# Names of Triton 3.7 and later, and of 3.6.
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

WARPS = gl.constexpr(4)  # of a group
REGISTERS_OF_CONSUMER = gl.constexpr(216)  # of a thread
REGISTERS_OF_PRODUCER = gl.constexpr(80)
WORDS = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0]))
COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread
KEYS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))


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
                following = gl.load(of_item + gl.minimum(chunk + 1, chunk_count - 1) * ITEMS)
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
    key_stride_b,
    value_stride_b,
    table_rows,
    length,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_t,
    value_stride_t,
    table_stride_t,
    table_stride_p,
    heads,
    positions,
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
    table = batch.to(gl.int64) * table_rows * table_stride_t
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
