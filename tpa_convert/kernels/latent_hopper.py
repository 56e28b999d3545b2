"""Weights of coded latent keys as `latent.py` makes them, for Hopper's matrix unit.

Sixteen warps share the work. One group of four, the *producer*, takes rows apart and loads weights
of keys into a ring in shared memory. Two others, the *consumers*, have a block of slots each:

    keys [T, 2 pairs] = codes [T, w] · weightᵀ [w, 2 pairs]              of each span
    scores [T, C] += rotated keys [T, pairs] · queriesᵀ [pairs, C]       heads by halves of a span

The matrix unit works for one while the other rotates. The last group, the *finisher*, makes weights
of the scores of both meanwhile. Programs stay: each goes through tiles of two blocks, so that what
is the same for all slots is brought to shared memory once.

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
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_names import synchronize
from .latent import AT_RUN_TIME
from .latent_hopper_codes import produce
from .latent_hopper_finish import finish
from .latent_hopper_offsets import load_offsets
from .latent_hopper_scores import (
    PAIRS_OF_KEYS,
    PAIRS_OF_SPAN,
    SCORES,
    SPANS,
    add_scores,
    attended_to,
    load_queries,
    load_row,
    side_by_side,
    whole_rows,
)
from .split_kv import slot_bounds

WARPS = gl.constexpr(4)  # of a group
OF_CONSUMER = gl.constexpr(168)  # registers of a thread
OF_FINISHER = gl.constexpr(104)
OF_PRODUCER = gl.constexpr(72)


@gluon.jit
def multiply(
    me: gl.constexpr,
    ring,
    of_one,
    of_other,
    chunk,
    n,
    STAGES: gl.constexpr,
    KEPT: gl.constexpr,
):
    """Adds what the n-th codes of the ring give to keys of both spans, and gives their stage back.
    To zeros that are constant nothing is added."""
    _, X, W, full, empty = ring
    stage = n % STAGES
    at = SPANS * (chunk if KEPT else stage)
    mbarrier.wait(full.index(stage), n // STAGES % 2)
    T: gl.constexpr = X.shape[1] // 2
    codes = X.index(stage).slice(me * T, T)
    right = W.index(at).permute((1, 0))
    of_one = warpgroup_mma(codes, right, of_one, is_async=True)
    right = W.index(at + 1).permute((1, 0))
    of_other = warpgroup_mma(codes, right, of_other, is_async=True)
    of_one, of_other = warpgroup_mma_wait(0, deps=(of_one, of_other))
    synchronize()
    # `chunk` is never below: values that only bounds of inner loops read are not kept from turn to
    # turn of outer ones by Triton before 3.8 (triton-lang/triton#9036).
    mbarrier.arrive(empty.index(stage), count=1, pred=chunk >= 0)
    return of_one, of_other


@gluon.jit
def consume(
    me: gl.constexpr,
    ring,
    passed,
    inputs,
    bounds,
    length,
    stride_t,
    BLOCKS: gl.constexpr,
    PAIRS: gl.constexpr,
    PADDED: gl.constexpr,
    HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    KEPT: gl.constexpr,
):
    """Empties the ring: scores of the first or the second block of each tile."""
    Q, X = ring[0], ring[1]
    S, given, taken = passed
    behind, cosine, sine = inputs
    mask, begin, stop = bounds
    T: gl.constexpr = X.shape[1] // 2
    LOW: gl.constexpr = 8 if PADDED > 8 else PADDED
    HIGH: gl.constexpr = PADDED // LOW
    WHOLE: gl.constexpr = X.dtype == gl.int8
    KEYS: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, 2 * PAIRS_OF_SPAN, 32 if WHOLE else 16]
    )
    # Cosines [T, high, low] serve all heads of a span: they are laid out as a head's keys are.
    a_span = gl.full([T, PAIRS_OF_SPAN], 0.0, Q.dtype, PAIRS_OF_KEYS)
    a_span = gl.reshape(a_span, [T, HIGH, HEADS, LOW])
    A_HEAD: gl.constexpr = gl.SliceLayout(2, a_span.type.layout)
    high = gl.arange(0, HIGH, gl.SliceLayout(0, gl.SliceLayout(2, A_HEAD)))
    low = gl.arange(0, LOW, gl.SliceLayout(0, gl.SliceLayout(1, A_HEAD)))
    pair = gl.expand_dims(high[None, :], 2) * LOW + gl.expand_dims(low[None, :], 1)
    in_block = gl.arange(0, T, gl.SliceLayout(1, gl.SliceLayout(2, A_HEAD)))
    zeros = gl.full([T, 2 * PAIRS_OF_SPAN], 0, gl.int32 if WHOLE else gl.float32, KEYS)
    nothing = gl.full([T, Q.shape[1]], 0.0, gl.float32, SCORES)
    n, tiles = 0, 0
    for tile in range(gl.program_id(0), gl.cdiv(length, 2 * T), gl.num_programs(0)):
        if attended_to(tile, begin, stop, mask, T):
            base = gl.minimum((tile * 2 + me) * T, length - 1)
            of_row = gl.minimum(in_block, length - 1 - base) * stride_t
            of_row = gl.expand_dims(of_row[:, None], 2)
            cosines = whole_rows(cosine + base.to(gl.int64) * stride_t, of_row)
            sines = whole_rows(sine + base.to(gl.int64) * stride_t, of_row)
            one = nothing, nothing
            other = nothing, nothing
            first, following = 0, gl.load(behind)
            for of_pairs in range(BLOCKS):
                last = following
                following = gl.load(behind + gl.minimum(of_pairs + 1, BLOCKS - 1))
                cos = load_row(cosines, of_pairs * PAIRS, pair, PAIRS, PADDED)
                sin = load_row(sines, of_pairs * PAIRS, pair, PAIRS, PADDED)
                keys = multiply(me, ring, zeros, zeros, first, n, STAGES, KEPT)
                n += 1
                for chunk in range(first + 1, last):
                    keys = multiply(me, ring, *keys, chunk, n, STAGES, KEPT)
                    n += 1
                of_one, of_other = keys
                one = add_scores(one, of_one, Q, of_pairs * 8, cos, sin, HEADS)
                other = add_scores(other, of_other, Q, of_pairs * 8 + 4, cos, sin, HEADS)
                first = last
            mbarrier.wait(taken.index(me), tiles % 2 ^ 1)
            S.index(me).store(side_by_side(one, other))
            synchronize()
            mbarrier.arrive(given.index(me), count=1)
            tiles += 1


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
    WIDTH: gl.constexpr,  # rotary pairs of a head, padded
    STAGES: gl.constexpr,  # of the ring
    KEPT: gl.constexpr,  # chunks of weights that shared memory has room for; 0 if not for all
):
    """`latent_weights_kernel` for keys without a norm, in two spans, in a cache in one piece, and
    cosines in rows of whole words of 16 bytes. The grid is [programs of a sequence, b]."""
    DTYPE: gl.constexpr = query.dtype.element_ty
    gl.static_assert(norm is None and pages is None and table_stride_p == 1)
    gl.static_assert(cosine.dtype.element_ty == DTYPE)
    CODES: gl.constexpr = weight.dtype.element_ty
    ROWS: gl.constexpr = 2 * PAIRS_OF_SPAN
    EACH: gl.constexpr = PAIRS_OF_SPAN // 2
    batch = gl.program_id(1)
    X = gl.allocate_shared_memory(
        CODES,
        [STAGES, 2 * BLOCK, CHUNK],
        gl.NVMMASharedLayout.get_default_for([2 * BLOCK, CHUNK], CODES),
    )
    W = gl.allocate_shared_memory(
        CODES,
        [SPANS * (KEPT or STAGES), ROWS, CHUNK],
        gl.NVMMASharedLayout.get_default_for([ROWS, CHUNK], CODES),
    )
    Q = gl.allocate_shared_memory(
        DTYPE,
        [8 * BLOCKS, COLUMNS, EACH],
        gl.NVMMASharedLayout.get_default_for([COLUMNS, EACH], DTYPE),
    )
    O = gl.allocate_shared_memory(  # noqa: E741
        DTYPE,
        [4, 4 * COLUMNS, WIDTH],
        gl.NVMMASharedLayout.get_default_for([4 * COLUMNS, WIDTH], DTYPE),
    )
    C = gl.allocate_shared_memory(
        DTYPE, [2, BLOCK, WIDTH], gl.NVMMASharedLayout.get_default_for([BLOCK, WIDTH], DTYPE)
    )
    S = gl.allocate_shared_memory(
        gl.float32, [2, BLOCK, 4 * COLUMNS], gl.SwizzledSharedLayout(4, 1, 8, [0, 1])
    )
    given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(given.index(half), count=1)
        mbarrier.init(taken.index(half), count=1)
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
    table = batch.to(gl.int64) * table_rows * table_stride_t
    if mask is not None:
        mask += batch.to(gl.int64) * mask_stride_b
    filled = X, W, full, empty
    ring = Q, X, W, full, empty
    passed = S, given, taken
    of_keys = behind, cosine + table, sine + table
    attended = mask, begin, stop
    inputs = O, C, keys, values, cosine + table, sine + table
    outputs = weights_out, block_terms
    bounds = mask, begin, stop, window
    strides = key_stride_t, value_stride_t, table_stride_t
    numbers = heads, positions, length, padded_columns, header_k, header_v
    factors = scale, softcap, octave_k, octave_v
    gl.warp_specialize(
        [
            (
                consume,
                (
                    0,
                    ring,
                    passed,
                    of_keys,
                    attended,
                    length,
                    table_stride_t,
                    BLOCKS,
                    PAIRS,
                    PADDED,
                    HEADS,
                    STAGES,
                    KEPT,
                ),
            ),
            (
                consume,
                (
                    1,
                    ring,
                    passed,
                    of_keys,
                    attended,
                    length,
                    table_stride_t,
                    BLOCKS,
                    PAIRS,
                    PADDED,
                    HEADS,
                    STAGES,
                    KEPT,
                ),
            ),
            (
                finish,
                (
                    passed,
                    inputs,
                    outputs,
                    bounds,
                    strides,
                    numbers,
                    factors,
                    GROUPS,
                    BLOCKS * PAIRS,
                    HEADS,
                    MULTIPLE,
                ),
            ),
            (
                produce,
                (
                    filled,
                    keys,
                    values,
                    items,
                    weight,
                    mask,
                    begin,
                    stop,
                    length,
                    key_stride_t,
                    value_stride_t,
                    header_v,
                    chunk_count,
                    STAGES,
                    KEPT,
                ),
            ),
        ],
        [WARPS, WARPS, WARPS],
        [OF_CONSUMER, OF_FINISHER, OF_PRODUCER],
    )
