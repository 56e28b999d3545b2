"""Decoding over wide coded rows in two passes: weights of all slots first, then sums over values.

Sums over thousands of value components for all heads do not fit one program, so weights go through
memory, fp16 [b, t, columns] relative to the maximum of their block of slots, and already times the
scale of the token's values. The second pass divides components among programs as well as slots, and
needs no running maximum.

Tiers are described by tuples of constants: BITS, WORD (offset in the row), WORDS and SIZE (words of
a chunk, a power of two). See `coded.py` for places and tables.
"""

# Triton's language has tuples that grow by addition only, and no types for them.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .coded import load_header
from .split_kv import LOG2_E, in_use, slot_bounds, tanh
from .unpack import unpack, unpack_wide

FIELDS_AT_ONCE = tl.constexpr(4)
BLOCKS_AT_ONCE = tl.constexpr(16)


@triton.constexpr_function
def tier_chunks(words, size, tier):
    """Chunks of the tiers before `tier`."""
    return sum(-(-w // s) for w, s in zip(words[:tier], size[:tier], strict=True))


@triton.constexpr_function
def tier_places(bits, words, size, tier):
    """Places of the tiers before `tier`."""
    tiers = zip(bits[:tier], words[:tier], size[:tier], strict=True)
    return sum(-(-w // s) * s * 16 // b for b, w, s in tiers)


@triton.jit
def _add_tier_scores(
    scores,
    keys,
    offset,
    valid,
    folded,
    row,
    inside,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds what the components of one tier bring to scores [T, C]."""
    FIELDS: tl.constexpr = 16 // BITS
    # Products of several fields at a time: more would not fit the registers, fewer would wait more.
    GROUP: tl.constexpr = min(FIELDS_AT_ONCE, FIELDS)
    word = tl.arange(0, SIZE)
    for chunk in tl.range(0, tl.cdiv(WORDS, SIZE), num_stages=STAGES):
        mask = valid[:, None]
        if WORDS % SIZE != 0:
            mask = mask & (chunk * SIZE + word < WORDS)[None, :]
        words = tl.load(
            keys + offset[:, None] + (WORD + chunk * SIZE + word)[None, :], mask=mask, other=0
        )
        for field in tl.static_range(0, FIELDS, GROUP):
            place = FIRST + (chunk * FIELDS + field) * SIZE + tl.arange(0, GROUP * SIZE)
            queries = tl.load(
                folded + row[None, :] + place[:, None], mask=inside[None, :], other=0.0
            )
            number = unpack_wide(words, field, GROUP, BITS, ASSEMBLY)
            scores = tl.dot(number, queries, scores)
    return scores


@triton.jit(do_not_specialize=["length", "positions", "window", "mask_stride_b"])
def weights_kernel(
    folded,
    column_terms,
    keys,
    values,
    weights_out,
    block_terms,
    start,
    end,
    mask,
    mask_stride_b,
    octave_k,
    octave_v,
    key_stride_b,
    key_stride_t,
    value_stride_b,
    value_stride_t,
    columns,
    positions,
    length,
    places,
    scale,
    softcap,
    window,
    BITS: tl.constexpr,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADER_K: tl.constexpr,
    SHIFT_K: tl.constexpr,
    CLASSES_K: tl.constexpr,
    HEADER_V: tl.constexpr,
    SHIFT_V: tl.constexpr,
    CLASSES_V: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    MULTIPLE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Weights of one block of slots.

    `block_terms` [b, blocks, 1 + CLASSES_V, columns]: maximum of the scores (base 2), sum of the
    weights, and that of each class of values but the first.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    block, batch, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, stop = slot_bounds(start, end, length, positions, window, batch)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    valid = slot >= begin
    if mask is None:
        valid = valid & (slot < stop)
    else:
        valid = valid & in_use(slot, stop, mask + batch.to(tl.int64) * mask_stride_b)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    if (block * BLOCK < stop) & (block * BLOCK + BLOCK > begin):
        row = tl.multiple_of((batch * columns + column) * places, 16)
        keys += tl.multiple_of(batch.to(tl.int64) * key_stride_b, ALIGN)
        values += tl.multiple_of(batch.to(tl.int64) * value_stride_b, ALIGN)
        offset = tl.multiple_of(slot.to(tl.int64) * key_stride_t, ALIGN)
        key_scale, key_class = load_header(
            keys, offset, valid, octave_k, HEADER_K, SHIFT_K, CLASSES_K
        )
        value_scale, value_class = load_header(
            values,
            slot.to(tl.int64) * value_stride_t,
            valid,
            octave_v,
            HEADER_V,
            SHIFT_V,
            CLASSES_V,
        )
        scores = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for i in tl.static_range(len(BITS)):
            scores = _add_tier_scores(
                scores,
                keys,
                offset,
                valid,
                folded,
                row,
                inside,
                WORD[i],
                WORDS[i],
                SIZE[i],
                BITS[i],
                tier_places(BITS, WORDS, SIZE, i),
                ASSEMBLY,
                STAGES,
            )
        terms = column_terms + batch * (2 + CLASSES_K) * columns + column
        norm = tl.load(terms, mask=inside, other=0.0)
        bias = tl.load(terms + columns, mask=inside, other=0.0)
        constant = tl.load(terms + 2 * columns, mask=inside, other=0.0)[None, :]
        for i in tl.static_range(1, CLASSES_K):
            of_class = tl.load(terms + (2 + i) * columns, mask=inside, other=0.0)
            constant = tl.where((key_class == i)[:, None], of_class[None, :], constant)
        scores = (scores - bias[None, :]) * key_scale[:, None] * norm[None, :] + constant
        if softcap is not None:
            scores = softcap * tanh(scores * (scale / softcap)) * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        attended = valid[:, None]
        if MULTIPLE:
            own = stop - positions + column % positions
            attended = attended & (slot[:, None] <= own[None, :])
            if window is not None:
                attended = attended & (slot[:, None] > own[None, :] - window)
        scores = tl.where(attended, scores, float("-inf"))
        highest = tl.max(scores, 0)
        weights = tl.exp2(scores - tl.where(highest == float("-inf"), 0.0, highest)[None, :])

        padded = tl.num_programs(2) * COLUMNS
        out = (batch.to(tl.int64) * length + slot) * padded
        tl.store(
            weights_out + out[:, None] + column[None, :],
            (weights * value_scale[:, None]).to(tl.float16),
            mask=(slot < length)[:, None],
        )
        out = (batch * tl.num_programs(0) + block) * (1 + CLASSES_V) * padded + column
        tl.store(block_terms + out, highest)
        tl.store(block_terms + out + padded, tl.sum(weights, 0))
        for i in tl.static_range(1, CLASSES_V):
            of_class = tl.where((value_class == i)[:, None], weights, 0.0)
            tl.store(block_terms + out + (1 + i) * padded, tl.sum(of_class, 0))


@triton.jit
def _sum_values(
    chunk,
    values,
    weights,
    block_terms,
    highest,
    first,
    last,
    value_stride_t,
    padded,
    stride,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCORE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of one chunk over slots [first, last), field by field, and the sum of the weights."""
    FIELDS: tl.constexpr = 16 // BITS
    word = tl.arange(0, SIZE)
    column = tl.arange(0, COLUMNS)
    weight_sum = tl.zeros([BLOCK, COLUMNS], tl.float32)
    outputs = ()
    for _ in tl.static_range(FIELDS):
        outputs = outputs + (tl.zeros([SIZE, COLUMNS], tl.float32),)
    for block in tl.range(first // BLOCK * BLOCK, last, BLOCK, num_stages=STAGES):
        slot = block + tl.arange(0, BLOCK)
        valid = (slot >= first) & (slot < last)
        weight = tl.load(
            weights + (slot.to(tl.int64) * padded)[:, None] + column[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        of_block = tl.load(block_terms + block // SCORE_BLOCK * stride + column)
        weight = (weight * tl.exp2(of_block - highest)[None, :]).to(tl.float16)
        weight_sum += weight
        offset = tl.multiple_of(slot.to(tl.int64) * value_stride_t, ALIGN)
        mask = valid[None, :]
        if WORDS % SIZE != 0:
            mask = mask & (chunk * SIZE + word < WORDS)[:, None]
        words = tl.load(
            values + offset[None, :] + (WORD + chunk * SIZE + word)[:, None], mask=mask, other=0
        )
        updated = ()
        for i in tl.static_range(FIELDS):
            number = unpack(words, i, BITS, ASSEMBLY)
            updated = updated + (tl.dot(number, weight, outputs[i]),)
        outputs = updated
    return outputs, tl.sum(weight_sum, 0)


@triton.jit(do_not_specialize=["length", "positions", "window", "splits", "blocks"])
def values_kernel(
    values,
    weights,
    block_terms,
    partial,
    partial_terms,
    start,
    end,
    value_stride_b,
    value_stride_t,
    columns,
    positions,
    length,
    places,
    window,
    splits,
    blocks,
    BITS: tl.constexpr,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    SCORE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Partial sums of values; `partial` and `partial_terms` are those of `join_coded_kernel`."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    chunk, split = tl.program_id(0), tl.program_id(1)
    batch, tile = tl.program_id(2) // TILES, tl.program_id(2) % TILES
    padded = TILES * COLUMNS
    begin, stop = slot_bounds(start, end, length, positions, window, batch)
    # Splits are runs of whole blocks of weights, whose maxima are known.
    first_block = begin // SCORE_BLOCK
    share = tl.cdiv(tl.cdiv(stop, SCORE_BLOCK) - first_block, splits)
    first_block += split * share
    first = tl.maximum(first_block * SCORE_BLOCK, begin)
    last = tl.minimum((first_block + share) * SCORE_BLOCK, stop)
    last_block = tl.cdiv(last, SCORE_BLOCK)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns

    stride = (1 + CLASSES) * padded
    block_terms += batch * blocks * stride + tile * COLUMNS
    terms = block_terms + tl.arange(0, COLUMNS)
    blocks_at_once = tl.arange(0, BLOCKS_AT_ONCE)[:, None]
    highest = tl.full([COLUMNS], float("-inf"), tl.float32)
    for block in range(first_block, last_block, BLOCKS_AT_ONCE):
        row = block + blocks_at_once
        of_blocks = tl.load(
            terms[None, :] + row * stride, mask=row < last_block, other=float("-inf")
        )
        highest = tl.maximum(highest, tl.max(of_blocks, 0))
    shift = tl.where(highest == float("-inf"), 0.0, highest)

    values += tl.multiple_of(batch.to(tl.int64) * value_stride_b, ALIGN)
    weights += batch.to(tl.int64) * length * padded + tile * COLUMNS
    index = batch * splits + split
    partial_terms += index * (2 + CLASSES) * columns + column
    if chunk == 0:
        tl.store(partial_terms, shift, mask=inside)
        for i in tl.static_range(CLASSES):
            total = tl.zeros([COLUMNS], tl.float32)
            for block in range(first_block, last_block, BLOCKS_AT_ONCE):
                row = block + blocks_at_once
                of_blocks = terms[None, :] + row * stride
                factor = tl.load(of_blocks, mask=row < last_block, other=float("-inf"))
                term = tl.load(of_blocks + (1 + i) * padded, mask=row < last_block, other=0.0)
                total += tl.sum(term * tl.exp2(factor - shift[None, :]), 0)
            tl.store(partial_terms + (2 + i) * columns, total, mask=inside)
    output_row = (index * columns + column).to(tl.int64) * places
    for i in tl.static_range(len(BITS)):
        in_tier = chunk - tier_chunks(WORDS, SIZE, i)
        if (in_tier >= 0) & (chunk < tier_chunks(WORDS, SIZE, i + 1)):
            outputs, weight_sum = _sum_values(
                in_tier,
                values,
                weights,
                block_terms,
                shift,
                first,
                last,
                value_stride_t,
                padded,
                stride,
                WORD[i],
                WORDS[i],
                SIZE[i],
                BITS[i],
                COLUMNS,
                SCORE_BLOCK,
                BLOCK,
                ALIGN,
                ASSEMBLY,
                STAGES,
            )
            if chunk == 0:
                tl.store(partial_terms + columns, weight_sum, mask=inside)
            for field in tl.static_range(16 // BITS[i]):
                place = tier_places(BITS, WORDS, SIZE, i) + tl.arange(0, SIZE[i])
                place += (in_tier * (16 // BITS[i]) + field) * SIZE[i]
                tl.store(
                    partial + output_row[None, :] + place[:, None],
                    outputs[field],
                    mask=inside[None, :],
                )
