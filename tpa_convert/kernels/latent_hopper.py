"""Weights of coded latent keys as `latent.py` makes them, for Hopper's matrix unit.

Twelve warps share the work. One group of four, the *producer*, takes rows apart and loads weights
of keys into a ring in shared memory. Two others, the *consumers*, have a block of slots each:

    keys [T, 2 pairs] = codes [T, w] · weightᵀ [w, 2 pairs]              both spans at once
    scores [T, C] += rotated keys [T, pairs] · queriesᵀ [pairs, C]       heads by halves of a span

The matrix unit works for one while the other rotates. Programs stay: each goes through tiles of two
blocks, so that what is the same for all slots is brought to shared memory once.

Codes and weights are whole numbers of eight bits, where those are enough, and their products are
exact; queries are taken times what keys are multiples of. The scale of a token comes to its scores
in the end, and what offsets of keys give to scores, where only cosines and sines differ from slot
to slot, comes from queries and offsets that were multiplied before.

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
    load_offsets,
    load_queries,
    load_row,
    scores_of_offsets,
    whole_rows,
    write_nothing,
    write_weights,
)
from .split_kv import slot_bounds

# Names of Triton 3.7 and later, and of 3.6.
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier
_memory = gl.shared_memory_descriptor
reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

WARPS = gl.constexpr(4)  # of a group
REGISTERS_OF_CONSUMER = gl.constexpr(216)  # of a thread
REGISTERS_OF_PRODUCER = gl.constexpr(80)
WORDS = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0]))
EVERY_BYTE = gl.constexpr(0x01010101)
SIGNS = gl.constexpr(-0x7F7F7F80)  # the highest bit of every byte


@gluon.constexpr_function
def copied(element):
    """Layout of weights that are copied: 16 bytes a thread."""
    return gl.BlockedLayout([1, 128 // element.primitive_bitwidth], [8, 4], [4, 1], [1, 0])


@gluon.jit
def store_codes(X, words, item):
    """Codes less their centres, of words [T, items], to where products read them."""
    if X.dtype == gl.int8:
        # Twice what the mask leaves, less the mask, is a number of eight bits; it is found with
        # 128 more, so that no byte takes from its neighbour.
        turn = ((item >> 16) - 1) & 31
        keep = (item >> 24) * EVERY_BYTE
        words = words.to(gl.uint32, bitcast=True)
        turned = words >> turn.to(gl.uint32)[None, :]
        turned |= words << ((32 - turn) & 31).to(gl.uint32)[None, :]
        codes = turned.to(gl.int32, bitcast=True) & (2 * keep)[None, :]
        codes = (codes + (SIGNS - keep)[None, :]) ^ SIGNS
        T: gl.constexpr = X.shape[0]
        ITEMS: gl.constexpr = X.shape[1] // 4
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([T, ITEMS], gl.int32)
        reinterpret(X, gl.int32, [T, ITEMS], LAYOUT).store(codes)
    else:
        X.store(numbers_of(words, item, X.dtype))


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
    """Fills the ring: codes in a chunk of places, of both blocks of a tile, and weights. A chunk is
    handed over when the weights of the next are on their way."""
    X, W, full, empty = ring
    T: gl.constexpr = X.shape[1]
    CHUNK: gl.constexpr = X.shape[2]
    ROWS: gl.constexpr = W.shape[1]
    ITEMS: gl.constexpr = CHUNK // 4
    COPIED: gl.constexpr = copied(W.dtype)
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
                of_chunk = weight + chunk * (SPANS * ROWS * CHUNK) + of_weight
                for span in gl.static_range(SPANS):
                    at = of_chunk + span * (ROWS * CHUNK)
                    copy_to_shared(W.index(SPANS * stage + span), at)
                async_copy.commit_group()
                following = gl.load(of_item + gl.minimum(chunk + 1, chunk_count - 1) * ITEMS)
                store_codes(X.index(2 * stage), words_low, item)
                words_low = gl.load(rows + (low + (following & 0xFFFF)[None, :]))
                store_codes(X.index(2 * stage + 1), words_high, item)
                words_high = gl.load(rows + (high + (following & 0xFFFF)[None, :]))
                item = following
                async_copy.wait_group(1)
                fence_async_shared()
                synchronize()
                mbarrier.arrive(full.index((n + STAGES - 1) % STAGES), count=1, pred=chunk > 0)
                n += 1
            async_copy.wait_group(0)
            fence_async_shared()
            synchronize()
            mbarrier.arrive(full.index((n + STAGES - 1) % STAGES), count=1)


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
    """Empties the ring: weights of one block of each tile, for the heads of one span."""
    Q, O, X, W, full, empty = ring
    keys, values, behind, cosine, sine = inputs
    weights_out, block_terms = outputs
    mask, begin, stop, window = bounds
    key_stride_t, value_stride_t, table_stride_t = strides
    heads, positions, length, chunk_count, padded_columns, header_k, header_v = numbers
    scale, softcap, octave_k, octave_v = factors
    mine: gl.constexpr = me
    T: gl.constexpr = X.shape[1]
    KEYS: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, 2 * PAIRS_OF_SPAN, 32 if X.dtype == gl.int8 else 16]
    )
    NUMBERS: gl.constexpr = gl.int32 if X.dtype == gl.int8 else gl.float32
    LOW: gl.constexpr = 8 if PADDED > 8 else PADDED
    HIGH: gl.constexpr = PADDED // LOW
    SLOTS: gl.constexpr = gl.SliceLayout(1, SCORES)
    # Cosines [T, high, low] serve all heads of a span: they are laid out as a head's keys are.
    a_span = gl.full([T, PAIRS_OF_SPAN], 0.0, Q.dtype, PAIRS_OF_KEYS)
    a_span = gl.reshape(a_span, [T, HIGH, HEADS, LOW])
    A_HEAD: gl.constexpr = gl.SliceLayout(2, a_span.type.layout)
    high = gl.arange(0, HIGH, gl.SliceLayout(0, gl.SliceLayout(2, A_HEAD)))
    low = gl.arange(0, LOW, gl.SliceLayout(0, gl.SliceLayout(1, A_HEAD)))
    pair = gl.expand_dims(high[None, :], 2) * LOW + gl.expand_dims(low[None, :], 1)
    in_block = gl.arange(0, T, gl.SliceLayout(1, gl.SliceLayout(2, A_HEAD)))
    per_half = HEADS // 2 * (heads // GROUPS) * positions
    blocks = gl.cdiv(length, T)
    batch = gl.program_id(1)
    n = 0
    for tile in range(gl.program_id(0), gl.cdiv(length, 2 * T), gl.num_programs(0)):
        block = tile * 2 + mine
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
            cosines = cosine + base.to(gl.int64) * table_stride_t
            sines = sine + base.to(gl.int64) * table_stride_t
            scores = scores_of_offsets(
                O,
                0,
                cosines,
                sines,
                last,
                table_stride_t,
                key_scale,
                key_class,
                any_class,
                BLOCKS * PAIRS,
            )
            others = scores_of_offsets(
                O,
                4,
                cosines,
                sines,
                last,
                table_stride_t,
                key_scale,
                key_class,
                any_class,
                BLOCKS * PAIRS,
            )
            of_row = gl.minimum(in_block, last) * table_stride_t
            of_row = gl.expand_dims(of_row[:, None], 2)
            cosines = whole_rows(cosines, of_row)
            sines = whole_rows(sines, of_row)
            first = 0
            for of_pairs in range(BLOCKS):
                last_chunk = gl.load(behind + of_pairs)
                cos = load_row(cosines, of_pairs * PAIRS, pair, PAIRS, PADDED).to(Q.dtype)
                sin = load_row(sines, of_pairs * PAIRS, pair, PAIRS, PADDED).to(Q.dtype)
                rebuilt = gl.full([T, 2 * PAIRS_OF_SPAN], 0, NUMBERS, KEYS)
                rebuilt2 = rebuilt
                for _ in range(first, last_chunk):
                    stage = n % STAGES
                    mbarrier.wait(full.index(stage), n // STAGES % 2)
                    left = X.index(2 * stage + mine)
                    right = W.index(2 * stage).permute((1, 0))
                    product = warpgroup_mma(left, right, rebuilt, is_async=True)
                    right2 = W.index(2 * stage + 1).permute((1, 0))
                    product2 = warpgroup_mma(left, right2, rebuilt2, is_async=True)
                    rebuilt, rebuilt2 = warpgroup_mma_wait(0, deps=(product, product2))
                    synchronize()
                    mbarrier.arrive(empty.index(stage), count=1)
                    n += 1
                if last_chunk > first:
                    index = of_pairs * SPANS * 4
                    scores = add_scores(scores, rebuilt, Q, index, cos, sin, HEADS)
                    others = add_scores(others, rebuilt2, Q, index + 4, cos, sin, HEADS)
                first = last_chunk
            write_weights(
                scores,
                0,
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
            write_weights(
                others,
                1,
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
    behind,
    weight,
    unit,
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
    table_stride_b,
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
    WIDTH: gl.constexpr,  # rotary pairs of a head, padded
    STAGES: gl.constexpr,  # of the ring
):
    """`latent_weights_kernel` for keys without a norm, in two spans, in a cache in one piece, and
    cosines in rows of whole words of 16 bytes. The grid is [programs of a sequence, b]."""
    gl.static_assert(norm is None and pages is None and table_stride_p == 1)
    DTYPE: gl.constexpr = query.dtype.element_ty
    CODES: gl.constexpr = weight.dtype.element_ty
    ROWS: gl.constexpr = 2 * PAIRS_OF_SPAN
    EACH: gl.constexpr = PAIRS_OF_SPAN // 2
    batch = gl.program_id(1)
    X = gl.allocate_shared_memory(
        CODES,
        [2 * STAGES, BLOCK, CHUNK],
        gl.NVMMASharedLayout.get_default_for([BLOCK, CHUNK], CODES),
    )
    W = gl.allocate_shared_memory(
        CODES,
        [SPANS * STAGES, ROWS, CHUNK],
        gl.NVMMASharedLayout.get_default_for([ROWS, CHUNK], CODES),
    )
    Q = gl.allocate_shared_memory(
        DTYPE,
        [8 * BLOCKS, COLUMNS, EACH],
        gl.NVMMASharedLayout.get_default_for([COLUMNS, EACH], DTYPE),
    )
    O = gl.allocate_shared_memory(  # noqa: E741
        DTYPE,
        [4 * SPANS, 2 * COLUMNS, WIDTH],
        gl.NVMMASharedLayout.get_default_for([2 * COLUMNS, WIDTH], DTYPE),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    query += batch.to(gl.int64) * query_stride_b
    of_queries = query_stride_h, query_stride_s, heads, positions
    load_queries(Q, query, unit, *of_queries, GROUPS, BLOCKS, PAIRS, PADDED, HEADS)
    load_offsets(O, query, offset, *of_queries, GROUPS, BLOCKS, PAIRS, PADDED, HEADS)
    synchronize()

    begin, stop = slot_bounds(start, end, length, positions, window, batch)
    keys += batch.to(gl.int64) * key_stride_b
    values += batch.to(gl.int64) * value_stride_b
    table = batch.to(gl.int64) * table_stride_b
    if mask is not None:
        mask += batch.to(gl.int64) * mask_stride_b
    filled = X, W, full, empty
    ring = Q, O, X, W, full, empty
    inputs = keys, values, behind, cosine + table, sine + table
    outputs = weights_out, block_terms
    bounds = mask, begin, stop, window
    strides = key_stride_t, value_stride_t, table_stride_t
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
