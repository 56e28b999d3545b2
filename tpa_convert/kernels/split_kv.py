"""Triton kernels of split-KV decoding: attention of a few queries over a long cache, in place.

Slots of the cache are spread over programs; each keeps a running softmax over its own, and a second
kernel joins them. Tokens take the rows of the matrix unit and queries (all heads and positions)
its columns, so that keys and values go from memory to the unit as they are:

    scores [T, C] = keys [T, w_k] · queriesᵀ [w_k, C]
    output [w_v, C] += valuesᵀ [w_v, T] · weights [T, C]

With contextual head factors a the products of each rank r are taken times them, [T, C] as well:

    scores = Σ_r a_r ⊙ (keys_r · queries_rᵀ)        output_r += values_rᵀ · (weights ⊙ a_r)

Lengths and splits are run-time arguments that compile nothing new: a text may grow.
"""

# Triton's language has tuples that grow by addition only, and no types for them.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCKS_AT_ONCE = tl.constexpr(16)  # whose masks are looked at
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    return 1 - 2 / (tl.exp2(x * (2 * LOG2_E)) + 1)


@triton.jit
def slot_bounds(start, end, length, positions, window, batch):
    """Slots [begin, stop) of a sequence that any of its query positions attends to."""
    stop = length
    if end is not None:
        stop = tl.minimum(tl.load(end + batch).to(tl.int32), length)
    begin = 0
    if start is not None:
        begin = tl.maximum(tl.load(start + batch).to(tl.int32), 0)
    if window is not None:
        begin = tl.maximum(begin, stop - positions - window + 1)
    return begin, stop


@triton.jit
def split_range(start, end, length, positions, window, batch, split, splits, BLOCK: tl.constexpr):
    """Slots [first, last) of this split, and the end of the sequence."""
    begin, stop = slot_bounds(start, end, length, positions, window, batch)
    blocks = tl.cdiv(tl.maximum(stop - begin, 0), BLOCK)
    share = tl.cdiv(blocks, splits) * BLOCK
    first = begin + split * share
    return first, tl.minimum(first + share, stop), stop


@triton.jit
def in_use(slot, last, mask):
    """Which slots [T] are attended to; `mask` is that of the sequence, or None."""
    valid = slot < last
    if mask is not None:
        valid = valid & (tl.load(mask + slot, mask=valid, other=0) != 0)
    return valid


@triton.jit
def masked_range(mask, begin, stop, split, splits, BLOCK: tl.constexpr):
    """Slots [first, last) that hold all blocks of this split in which the mask leaves any: every
    `splits`-th block of the sequence, so that a short text in a long cache is shared evenly."""
    own = tl.cdiv(tl.cdiv(tl.maximum(stop - begin, 0), BLOCK) - split, splits)
    lowest, highest = own, 0
    for i in range(0, own, BLOCKS_AT_ONCE):
        index = i + tl.arange(0, BLOCKS_AT_ONCE)
        slot = begin + (split + index * splits)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        used = tl.max(tl.load(mask + slot, mask=slot < stop, other=0).to(tl.int32), 1) != 0
        lowest = tl.minimum(lowest, tl.min(tl.where(used, index, own), 0))
        highest = tl.maximum(highest, tl.max(tl.where(used, index + 1, 0), 0))
    first = begin + (split + lowest * splits) * BLOCK
    return first, begin + (split + highest * splits) * BLOCK


@triton.jit
def softmax_step(
    scores, slot, valid, own, scale, softcap, window, highest, total, MULTIPLE: tl.constexpr
):
    """A step of the running softmax over rows: weights, rescaling factor, new running values.

    `scores` and weights are [T, C], slots [T], the others [C]. Exponents are in base 2.
    """
    if softcap is not None:
        scores = softcap * tanh(scores * (scale / softcap)) * LOG2_E
    else:
        scores = scores * (scale * LOG2_E)
    attended = valid[:, None]
    if MULTIPLE:  # several query positions, each with its own last slot
        attended = attended & (slot[:, None] <= own[None, :])
        if window is not None:
            attended = attended & (slot[:, None] > own[None, :] - window)
    scores = tl.where(attended, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 0))
    # A column that has seen no slot keeps -inf; shifting it by 0 avoids inf - inf.
    shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - shift[None, :])
    rescale = tl.exp2(highest - shift)
    return weights, rescale, new_highest, total * rescale + tl.sum(weights, 0)


@triton.jit
def _load(rows, offset, valid, first, width, SIZE: tl.constexpr):
    """Components `first` to `first` + SIZE of rows at `offset` [T], as [T, SIZE]."""
    component = first + tl.arange(0, SIZE)[None, :]
    mask = valid[:, None] & (component < width)
    return tl.load(rows + offset[:, None] + component, mask=mask, other=0.0)


@triton.jit
def _slot_offset(slot, page, stride_page, stride_t, PAGE: tl.constexpr, ALIGN: tl.constexpr):
    """Where slots [T] stand; `page` [T] holds the pages that they are in, if PAGE is not 0."""
    if PAGE == 0:
        return tl.multiple_of(slot.to(tl.int64) * stride_t, ALIGN)
    return tl.multiple_of(page * stride_page + (slot % PAGE).to(tl.int64) * stride_t, ALIGN)


@triton.jit
def _load_factors(factors, offset, valid, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """All COUNT head factors of each slot, [T, SIZE]."""
    factor = tl.arange(0, SIZE)[None, :]
    mask = valid[:, None] & (factor < COUNT)
    return tl.load(factors + offset[:, None] + factor, mask=mask, other=0.0)


@triton.jit
def _of_columns(factors, group, rank, GROUPS: tl.constexpr, PRECISION: tl.constexpr):
    """The factor of one rank for each column [T, C], picked by the matrix unit: exact, and where
    the scores are."""
    factor = tl.arange(0, factors.shape[1])[:, None]
    picks = (factor == rank * GROUPS + group[None, :]).to(factors.dtype)
    return tl.dot(factors, picks, input_precision=PRECISION)


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit(
    do_not_specialize=["length", "positions", "window", "splits", "pages_stride_b", "mask_stride_b"]
)
def split_kernel(
    query,
    keys,
    values,
    key_heads,
    value_heads,
    partial,
    partial_lse,
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
    key_heads_stride_b,
    key_heads_stride_t,
    value_heads_stride_b,
    value_heads_stride_t,
    length,
    splits,
    heads,
    positions,
    eighths_k,  # widths / 8: tells the compiler that loads of 8 do not cross their ends
    eighths_v,
    scale,
    softcap,
    window,
    COLUMNS: tl.constexpr,
    CHUNK_K: tl.constexpr,
    CHUNKS_K: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS_V: tl.constexpr,
    RANK_K: tl.constexpr,  # 0 without contextual head factors
    RANK_V: tl.constexpr,
    GROUPS: tl.constexpr,  # key/value heads that head factors are for
    FACTORS_K: tl.constexpr,  # of all ranks and groups, padded
    FACTORS_V: tl.constexpr,
    FACTORS_ALIGN: tl.constexpr,
    PAGE: tl.constexpr,  # slots of a page, 0 for caches in one piece
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    MULTIPLE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    split, batch, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width_k, width_v = eighths_k * 8, eighths_v * 8
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < heads * positions
    head, position = column // positions, column % positions
    group = head // (heads // GROUPS)
    first, last, stop = split_range(
        start, end, length, positions, window, batch, split, splits, BLOCK
    )
    bound, stride = last, BLOCK
    if mask is not None:
        mask += batch.to(tl.int64) * mask_stride_b
        begin, _ = slot_bounds(start, end, length, positions, window, batch)
        first, bound = masked_range(mask, begin, stop, split, splits, BLOCK)
        last, stride = stop, BLOCK * splits
    own = stop - positions + position

    query += tl.multiple_of(batch.to(tl.int64) * query_stride_b, ALIGN)
    query_offset = tl.multiple_of(head * query_stride_h + position * query_stride_s, ALIGN)
    queries = ()
    for i in tl.static_range(CHUNKS_K):
        part = _load(query, query_offset, inside, i * CHUNK_K, width_k, CHUNK_K)
        queries = queries + (tl.trans(part),)

    if PAGE == 0:
        keys += tl.multiple_of(batch.to(tl.int64) * key_stride_b, ALIGN)
        values += tl.multiple_of(batch.to(tl.int64) * value_stride_b, ALIGN)
        if RANK_K > 0:
            key_heads += tl.multiple_of(batch.to(tl.int64) * key_heads_stride_b, FACTORS_ALIGN)
        if RANK_V > 0:
            value_heads += tl.multiple_of(batch.to(tl.int64) * value_heads_stride_b, FACTORS_ALIGN)
    highest = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    outputs = ()
    for _ in tl.static_range(CHUNKS_V):
        outputs = outputs + (_zeros(CHUNK_V, COLUMNS),)

    for block in tl.range(first, bound, stride, num_stages=STAGES):
        slot = block + tl.arange(0, BLOCK)
        valid = slot < last
        attended = in_use(slot, last, mask)
        page = 0
        if PAGE > 0:
            page = tl.load(pages + batch * pages_stride_b + slot // PAGE, mask=valid, other=0)
            page = page.to(tl.int64)
        key_offset = _slot_offset(slot, page, key_stride_b, key_stride_t, PAGE, ALIGN)
        scores = tl.zeros([BLOCK, COLUMNS], tl.float32)
        if RANK_K > 0:
            factor_offset = _slot_offset(
                slot, page, key_heads_stride_b, key_heads_stride_t, PAGE, FACTORS_ALIGN
            )
            key_factors = _load_factors(key_heads, factor_offset, valid, RANK_K * GROUPS, FACTORS_K)
        if RANK_K <= 1:
            for i in tl.static_range(CHUNKS_K):
                key = _load(keys, key_offset, valid, i * CHUNK_K, width_k, CHUNK_K)
                scores = tl.dot(key, queries[i], scores, input_precision=PRECISION)
            if RANK_K == 1:
                scores *= _of_columns(key_factors, group, 0, GROUPS, PRECISION)
        else:  # the real and the imaginary parts of a rank are RANK_K chunks apart
            for rank in tl.static_range(RANK_K):
                of_rank = tl.zeros([BLOCK, COLUMNS], tl.float32)
                for half in tl.static_range(2):
                    first_k = (half * RANK_K + rank) * CHUNK_K
                    key = _load(keys, key_offset, valid, first_k, width_k, CHUNK_K)
                    of_rank = tl.dot(
                        key, queries[half * RANK_K + rank], of_rank, input_precision=PRECISION
                    )
                scores += of_rank * _of_columns(key_factors, group, rank, GROUPS, PRECISION)
        weights, rescale, highest, total = softmax_step(
            scores, slot, attended, own, scale, softcap, window, highest, total, MULTIPLE
        )
        value_offset = _slot_offset(slot, page, value_stride_b, value_stride_t, PAGE, ALIGN)
        value_factor_offset = _slot_offset(
            slot, page, value_heads_stride_b, value_heads_stride_t, PAGE, FACTORS_ALIGN
        )
        if RANK_V > 0:
            value_factors = _load_factors(
                value_heads, value_factor_offset, attended, RANK_V * GROUPS, FACTORS_V
            )
        if RANK_V == 1:
            weights *= _of_columns(value_factors, group, 0, GROUPS, PRECISION)
        scaled = weights.to(values.dtype.element_ty)
        updated = ()
        for i in tl.static_range(CHUNKS_V):
            value = _load(values, value_offset, attended, i * CHUNK_V, width_v, CHUNK_V)
            if RANK_V > 1:  # a chunk is a rank
                factors = _of_columns(value_factors, group, i, GROUPS, PRECISION)
                scaled = (weights * factors).to(values.dtype.element_ty)
            updated = updated + (
                tl.dot(
                    tl.trans(value),
                    scaled,
                    outputs[i] * rescale[None, :],
                    input_precision=PRECISION,
                ),
            )
        outputs = updated

    row = ((batch * splits + split) * heads * positions + column).to(tl.int64)
    tl.store(partial_lse + row, highest + tl.log2(total), mask=inside)
    inverse = 1 / tl.where(total == 0, 1.0, total)
    for i in tl.static_range(CHUNKS_V):
        component = i * CHUNK_V + tl.arange(0, CHUNK_V)[:, None]
        tl.store(
            partial + (row * width_v)[None, :] + component,
            outputs[i] * inverse[None, :],
            mask=inside[None, :] & (component < width_v),
        )


@triton.jit(do_not_specialize=["splits"])
def join_kernel(
    partial,
    partial_lse,
    output,
    splits,
    rows,
    width,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Joins the splits of one row (a query head and position): softmax over their log-sum-exps.

    `partial` [b, splits, rows, width] fp32 and `partial_lse` [b, splits, rows] in base 2 become
    `output` [b, rows, width].
    """
    if OVERLAP:
        gdc_wait()
    row, batch = tl.program_id(0), tl.program_id(2)
    component = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    partial_lse += batch * splits * rows + row
    partial += (batch * splits * rows + row).to(tl.int64) * width
    highest = float("-inf")
    total = 0.0
    result = tl.zeros([CHUNK], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        lse = tl.load(partial_lse + split * rows, mask=split < splits, other=float("-inf"))
        new_highest = tl.maximum(highest, tl.max(lse, 0))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weight = tl.exp2(lse - shift)
        part = tl.load(
            partial + (split.to(tl.int64) * rows * width)[:, None] + component[None, :],
            mask=(split < splits)[:, None] & (component < width)[None, :],
            other=0.0,
        )
        rescale = tl.exp2(highest - shift)
        result = result * rescale + tl.sum(weight[:, None] * part, 0)
        total = total * rescale + tl.sum(weight, 0)
        highest = new_highest
    result = result / tl.where(total == 0, 1.0, total)
    offset = (batch * rows + row).to(tl.int64) * width
    tl.store(output + offset + component, result, mask=component < width)
