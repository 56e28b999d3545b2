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

from .latent import AT_RUN_TIME, block_rows, load_bias, load_header, load_words, numbers_of
from .split_kv import slot_bounds

BLOCKS_AT_ONCE = tl.constexpr(16)  # whose maxima are compared


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
    key_stride_t,
    value_stride_b,
    value_stride_t,
    columns,
    positions,
    length,
    total,
    key_items,
    first_piece,
    padded_columns,
    window,
    octave_k,
    octave_v,
    header_k,
    header_v,
    splits,
    blocks,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Partial sums of a piece.

    `partial` is [b, splits, columns, places] and `partial_terms` [b, splits, terms, columns]: what
    the sums are relative to, and the terms of `latent_weights_kernel` added up.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    piece, split = first_piece + tl.program_id(0), tl.program_id(1)
    batch, tile = tl.program_id(2) // TILES, tl.program_id(2) % TILES
    begin, stop = slot_bounds(start, end, length, positions, window, batch)
    first_block = begin // BLOCK
    share = tl.cdiv(tl.cdiv(stop, BLOCK) - first_block, splits)
    first_block += split * share
    last_block = tl.minimum(first_block + share, tl.cdiv(stop, BLOCK))
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns

    TERMS: tl.constexpr = 4
    stride = TERMS * padded_columns
    terms = block_terms + batch * blocks * stride + column
    highest = tl.full([COLUMNS], float("-inf"), tl.float32)
    for block in range(first_block, last_block, BLOCKS_AT_ONCE):
        row = block + tl.arange(0, BLOCKS_AT_ONCE)[:, None]
        known = (row < last_block) & inside[None, :]
        of_blocks = tl.load(terms[None, :] + row * stride, mask=known, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(of_blocks, 0))
    shift = tl.where(highest == float("-inf"), 0.0, highest)

    index = batch * splits + split
    if tl.program_id(0) == 0:
        out = partial_terms + index * (TERMS * columns) + column
        tl.store(out, shift, mask=inside)
        for i in tl.static_range(1, TERMS):
            summed = tl.zeros([COLUMNS], tl.float32)
            for block in range(first_block, last_block, BLOCKS_AT_ONCE):
                row = block + tl.arange(0, BLOCKS_AT_ONCE)[:, None]
                known = (row < last_block) & inside[None, :]
                of_blocks = terms[None, :] + row * stride
                factor = tl.load(of_blocks, mask=known, other=float("-inf"))
                term = tl.load(of_blocks + i * padded_columns, mask=known, other=0.0)
                summed += tl.sum(term * tl.exp2(factor - shift[None, :]), 0)
            tl.store(out + i * columns, summed, mask=inside)

    ITEMS: tl.constexpr = PIECE // 4
    item = piece * ITEMS
    of_values = item >= key_items
    rows = keys
    if of_values:
        rows = values
    stride_b = tl.where(of_values, value_stride_b.to(tl.int64), key_stride_b.to(tl.int64))
    stride_t = tl.where(of_values, value_stride_t.to(tl.int64), key_stride_t.to(tl.int64))
    octave = tl.where(of_values, octave_v, octave_k)
    header = tl.where(of_values, header_v, header_k)
    weights += batch.to(tl.int64) * length * padded_columns
    DTYPE: tl.constexpr = weights.dtype.element_ty
    if TRANSPOSED:
        sums = tl.zeros([PIECE, COLUMNS], tl.float32)
    else:
        sums = tl.zeros([COLUMNS, PIECE], tl.float32)
    for block in range(first_block, last_block):
        of_block = tl.load(terms + block * stride, mask=inside, other=float("-inf"))
        if tl.max(of_block, 0) > float("-inf"):  # otherwise nothing has been written
            slot = block * BLOCK + tl.arange(0, BLOCK)
            _, valid = load_bias(mask, batch, mask_stride_b, slot, begin, stop)
            here, offset = block_rows(
                rows, pages, batch, block, valid, pages_stride_b, stride_b, stride_t, PAGE, BLOCK
            )
            words = load_words(here, offset, valid, items, item, ITEMS)
            of_slots = weights + tl.cast(block, tl.int64) * BLOCK * padded_columns
            weight = tl.load(
                of_slots + (tl.arange(0, BLOCK) * padded_columns)[None, :] + column[:, None],
                mask=inside[:, None] & valid[None, :],
                other=0.0,
            ).to(tl.float32)
            scale, _ = load_header(here, offset, valid, octave, header)
            weight *= tl.exp2((of_block - shift)[:, None] + scale[None, :])
            found = numbers_of(words, items, item, total, ITEMS).to(DTYPE)
            if TRANSPOSED:
                sums = tl.dot(
                    tl.trans(found), tl.trans(weight.to(DTYPE)), sums, input_precision=PRECISION
                )
            else:
                sums = tl.dot(weight.to(DTYPE), found, sums, input_precision=PRECISION)
    row = (index * columns + column).to(tl.int64) * (4 * total)
    place = 4 * item + tl.arange(0, PIECE)
    if TRANSPOSED:
        tl.store(partial + row[None, :] + place[:, None], sums, mask=inside[None, :])
    else:
        tl.store(partial + row[:, None] + place[None, :], sums, mask=inside[:, None])


@triton.jit(do_not_specialize=["splits"])
def latent_join_kernel(
    partial,
    partial_terms,
    output,
    place_of,
    step,
    columns,
    places,
    features,
    splits,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Joins the splits of one column: features [b, columns, features], or zeros for no slots."""
    if OVERLAP:
        gdc_wait()
    column, batch = tl.program_id(0), tl.program_id(2)
    feature = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    used = feature < features
    TERMS: tl.constexpr = 4
    stride = TERMS * columns
    partial_terms += batch * splits * stride + column
    partial += (batch * splits * columns + column).to(tl.int64) * places

    # Splits without weights stand for nothing, whatever they are relative to.
    highest = float("-inf")
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        terms = partial_terms + split * stride
        shift = tl.load(terms, mask=split < splits, other=float("-inf"))
        total = tl.load(terms + columns, mask=split < splits, other=0.0)
        highest = tl.maximum(highest, tl.max(tl.where(total > 0, shift, float("-inf")), 0))
    highest = tl.where(highest == float("-inf"), 0.0, highest)

    place = tl.load(place_of + feature, mask=used, other=0)
    denominator = 0.0
    result = tl.zeros([CHUNK], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        terms = partial_terms + split * stride
        total = tl.load(terms + columns, mask=split < splits, other=0.0)
        valid = total > 0
        factor = tl.exp2(tl.load(terms, mask=valid, other=float("-inf")) - highest)
        denominator += tl.sum(total * factor, 0)
        of_split = (split.to(tl.int64) * columns * places)[:, None]
        for i in tl.static_range(PARTS):
            at = tl.load(place_of + i * features + feature, mask=used, other=-1)
            part = tl.load(
                partial + at[None, :] + of_split,
                mask=(at >= 0)[None, :] & valid[:, None],
                other=0.0,
            )
            times = tl.load(step + i * features + feature, mask=used, other=0.0)
            result += tl.sum(factor[:, None] * part, 0) * times
        for i in tl.static_range(2, TERMS):  # what belongs to the second class
            of_class = tl.sum(factor * tl.load(terms + i * columns, mask=valid, other=0.0), 0)
            result += tl.where(used & (place == 1 - i), of_class, 0.0)
    result /= tl.where(denominator == 0, 1.0, denominator)
    offset = (batch * columns + column).to(tl.int64) * features
    tl.store(output + offset + feature, result, mask=used)
