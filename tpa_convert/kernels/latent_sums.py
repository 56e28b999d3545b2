"""Sums over slots of what `latent.py` has weighed, and their join.

Every program sums one piece of the components, of keys or of values, over some blocks of slots:

    sums [C, n] += weightsᵀ [C, T] · components [T, n]

Steps, classes and what values take from keys are applied once, to the sums.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .latent import (
    AT_RUN_TIME,
    block_rows,
    load_words,
    numbers_of,
)
from .split_kv import slot_bounds

BLOCKS_AT_ONCE = tl.constexpr(16)  # whose maxima are compared
TERMS = tl.constexpr(4)  # of a block; see `latent_weights_kernel`


@triton.jit(do_not_specialize=[*AT_RUN_TIME, "splits", "blocks"])
def latent_sums_kernel(
    keys,
    values,
    items,
    weights,
    block_terms,
    partial,
    partial_terms,
    pages,
    start,
    end,
    mask,
    pages_stride_b,
    mask_stride_b,
    key_stride_b,
    value_stride_b,
    length,
    splits,
    blocks,
    key_stride_t,
    value_stride_t,
    columns,
    positions,
    total,
    key_items,
    first_item,
    padded_columns,
    window,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,  # slots, of whose weights the maximum is known
    SLOTS: tl.constexpr,  # at a time
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Partial sums of a piece.

    `partial` is [b, splits, columns, places] and `partial_terms` [b, splits, terms, columns]: what
    the sums are relative to, and the terms of `latent_weights_kernel` added up.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    ITEMS: tl.constexpr = PIECE // 4
    piece, split = first_item // ITEMS + tl.program_id(0), tl.program_id(1)
    batch, tile = tl.program_id(2) // TILES, tl.program_id(2) % TILES
    begin, stop = slot_bounds(start, end, length, positions, window, batch)
    # Every `splits`-th block, so that a short text in a long cache is shared evenly.
    first_block = begin // BLOCK + split
    own = tl.cdiv(tl.maximum(tl.cdiv(stop, BLOCK) - first_block, 0), splits)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns

    stride = TERMS * padded_columns
    terms = block_terms + (batch * blocks + first_block) * stride + column
    stride *= splits
    highest = tl.full([COLUMNS], float("-inf"), tl.float32)
    first, last = tl.maximum(own, 1), 0  # blocks that nothing attends to hold no weights
    for i in range(0, own, BLOCKS_AT_ONCE):
        index = i + tl.arange(0, BLOCKS_AT_ONCE)
        known = (index < own)[:, None] & inside[None, :]
        of_blocks = tl.load(
            terms[None, :] + index[:, None] * stride, mask=known, other=float("-inf")
        )
        highest = tl.maximum(highest, tl.max(of_blocks, 0))
        used = tl.max(of_blocks, 1) > float("-inf")
        first = tl.minimum(first, tl.min(tl.where(used, index, own), 0))
        last = tl.maximum(last, tl.max(tl.where(used, index + 1, 0), 0))
    shift = tl.where(highest == float("-inf"), 0.0, highest)

    of_split = batch * splits + split
    if tl.program_id(0) == 0:
        out = partial_terms + of_split * (TERMS * columns) + column
        tl.store(out, shift, mask=inside)
        for term in tl.static_range(1, TERMS):
            summed = tl.zeros([COLUMNS], tl.float32)
            for i in range(0, own, BLOCKS_AT_ONCE):
                index = i + tl.arange(0, BLOCKS_AT_ONCE)
                known = (index < own)[:, None] & inside[None, :]
                of_blocks = terms[None, :] + index[:, None] * stride
                factor = tl.load(of_blocks, mask=known, other=float("-inf"))
                of_blocks = tl.load(of_blocks + term * padded_columns, mask=known, other=0.0)
                summed += tl.sum(of_blocks * tl.exp2(factor - shift[None, :]), 0)
            tl.store(out + term * columns, summed, mask=inside)

    of_values = piece * ITEMS >= key_items
    item = tl.load(items + piece * ITEMS + tl.arange(0, ITEMS))
    rows = keys
    if of_values:
        rows = values
    stride_b = tl.where(of_values, value_stride_b.to(tl.int64), key_stride_b.to(tl.int64))
    stride_t = tl.where(of_values, value_stride_t.to(tl.int64), key_stride_t.to(tl.int64))
    weights += (batch * blocks + first_block).to(tl.int64) * (2 * padded_columns * BLOCK)
    weights += (of_values.to(tl.int64) * padded_columns + tile * COLUMNS) * BLOCK
    of_weight = (tl.arange(0, COLUMNS) * BLOCK)[:, None] + tl.arange(0, SLOTS)[None, :]
    SHARES: tl.constexpr = BLOCK // SLOTS  # of a block
    NUMBERS: tl.constexpr = weights.dtype.element_ty
    begins, ends = first * SHARES, last * SHARES
    sums = tl.zeros([COLUMNS, PIECE], tl.float32)
    # What the next step adds up is loaded before this one's product; the first step loads only.
    words = tl.zeros([SLOTS, ITEMS], tl.int32)
    weight = tl.zeros([COLUMNS, SLOTS], NUMBERS)
    of_block = tl.zeros([COLUMNS], tl.float32)
    for step in range(begins - 1, ends):
        left = (weight.to(tl.float32) * tl.exp2(of_block - shift)[:, None]).to(NUMBERS)
        right = numbers_of(words, item, NUMBERS)

        following = tl.minimum(step + 1, ends - 1)
        index, share = following // SHARES, following % SHARES
        block = (first_block + index * splits) * SHARES + share
        slot = block * SLOTS + tl.arange(0, SLOTS)
        valid = (slot >= begin) & (slot < stop)
        here, offset = block_rows(
            rows,
            pages,
            batch,
            block,
            valid,
            length,
            pages_stride_b,
            stride_b,
            stride_t,
            PAGE,
            SLOTS,
        )
        words = load_words(here, offset, item)
        of_block = tl.load(terms + index * stride, mask=inside, other=float("-inf"))
        of_slots = weights + tl.cast(index, tl.int64) * splits * (2 * padded_columns * BLOCK)
        weight = tl.load(of_slots + share * SLOTS + of_weight, mask=inside[:, None], other=0.0)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    row = (of_split * columns + column).to(tl.int64) * (4 * total)
    place = piece * PIECE + tl.arange(0, PIECE)
    tl.store(partial + row[:, None] + place[None, :], sums, mask=inside[:, None])


@triton.jit(do_not_specialize=["splits"])
def latent_join_kernel(
    partial,
    partial_terms,
    output,
    place_of,
    step,
    splits,
    columns,
    together,
    places,
    features,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Joins the splits of one column: features [columns / together, b, together, features], or
    zeros for no slots."""
    column, batch = tl.program_id(0), tl.program_id(2)
    feature = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    used = feature < features
    # What the kernel before does not write is loaded while that ends; all else is loaded at once.
    place = tl.load(place_of + feature, mask=used, other=0)
    if OVERLAP:
        gdc_wait()
    stride = TERMS * columns
    partial_terms += batch * splits * stride + column
    partial += (batch * splits * columns + column).to(tl.int64) * places

    split = tl.arange(0, SPLITS)
    known = split < splits
    terms = partial_terms + split * stride
    total = tl.load(terms + columns, mask=known, other=0.0)
    shift = tl.load(terms, mask=known, other=float("-inf"))
    valid = total > 0  # others stand for nothing, whatever they are relative to
    highest = tl.max(tl.where(valid, shift, float("-inf")), 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    factor = tl.where(valid, tl.exp2(shift - highest), 0.0)
    denominator = tl.sum(total * factor, 0)
    of_split = (split.to(tl.int64) * columns * places)[:, None]
    result = tl.zeros([CHUNK], tl.float32)
    for i in tl.static_range(PARTS):
        at = place if i == 0 else tl.load(place_of + i * features + feature, mask=used, other=-1)
        # Neighbours mostly are near each other: lanes of a warp should take them, not splits.
        at = tl.max_contiguous(at, CHUNK)
        there = (at >= 0)[None, :] & used[None, :] & known[:, None]
        part = tl.load(partial + at[None, :] + of_split, mask=there, other=0.0)
        times = tl.load(step + i * features + feature, mask=used, other=0.0)
        result += tl.sum(tl.where(valid[:, None], factor[:, None] * part, 0.0), 0) * times
    for i in tl.static_range(2, TERMS):  # what belongs to the second class
        of_class = tl.load(terms + i * columns, mask=known, other=0.0)
        of_class = tl.sum(tl.where(valid, factor * of_class, 0.0), 0)
        result += tl.where(used & (place == 1 - i), of_class, 0.0)
    result /= tl.where(denominator == 0, 1.0, denominator)
    row = (column // together * tl.num_programs(2) + batch) * together + column % together
    offset = row.to(tl.int64) * features
    tl.store(output + offset + feature, result, mask=used)
