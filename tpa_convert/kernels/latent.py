"""Weights of coded latent keys: rows to keys to softmax, block of slots by block.

A program holds some heads and a block of slots. Block by block of rotary pairs it takes the rows
apart once, rebuilds the keys of its heads, rotates them and adds their products with the queries:

    keysᵀ [2 pairs, T] = weight [2 pairs, w] · componentsᵀ [w, T]        real and imaginary parts
    scores [C, T] += queries [C, pairs] · rotated keysᵀ [pairs, T]

Weights go through memory, relative to the maximum of their block of slots; `latent_sums.py` sums
what they weigh.

What is computed stands on the right of every product. Its left side, where Hopper's matrix unit
could take it from registers, is always something loaded: assemblers before CUDA 13.3 reuse such
registers while the unit still reads them, which gives wrong results (triton-lang/triton#11781).
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .split_kv import LOG2_E, slot_bounds, tanh

STEPS = tl.constexpr(8)  # scales of an octave
SCALES = tl.constexpr(128)  # of a header; above them, its class
NEVER = tl.constexpr(-60000.0)  # the lowest number of fp16 is below
WHOLE = tl.constexpr(0x4B000000)  # 2^23 as fp32: integers below stand in its lowest bits


@triton.jit
def block_rows(
    rows,
    pages,
    batch,
    block,
    valid,
    pages_stride_b,
    stride_b,
    stride_t,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A pointer, and offsets from it [T], of the rows in a block of slots. Offsets of a cache in
    one piece are short: long ones would take twice the registers."""
    if PAGE == 0:
        rows += batch.to(tl.int64) * stride_b + tl.cast(block, tl.int64) * BLOCK * stride_t
        offset = tl.arange(0, BLOCK) * tl.cast(stride_t, tl.int32)
    else:
        slot = block * BLOCK + tl.arange(0, BLOCK)
        page = tl.load(pages + batch * pages_stride_b + slot // PAGE, mask=valid, other=0)
        offset = page.to(tl.int64) * stride_b + (slot % PAGE).to(tl.int64) * stride_t
    return rows, offset


@triton.jit
def load_bias(mask, batch, stride_b, slot, begin, stop):
    """What a mask adds to the scores of slots [T], and which of them are attended to.

    The mask is boolean, or of numbers that are added, where the lowest means never.
    """
    valid = (slot >= begin) & (slot < stop)
    bias = tl.zeros(slot.shape, tl.float32)
    if mask is not None:
        mask += batch.to(tl.int64) * stride_b
        if mask.dtype.element_ty.is_floating():
            bias = tl.load(mask + slot, mask=valid, other=0).to(tl.float32)
            valid = valid & (bias > NEVER)
            bias = tl.where(valid, bias, 0.0)
        else:
            valid = valid & (tl.load(mask + slot, mask=valid, other=0) != 0)
    return bias, valid


@triton.jit
def load_header(rows, offset, valid, header_byte):
    """The word [T] with the header of each token."""
    return tl.load(rows + offset + header_byte // 4, mask=valid, other=0)


@triton.jit
def header_of(word, octave, header_byte):
    """Scale [T] of each token as a power of two, and 1 for those of the second class, in fp32."""
    header = (word >> (header_byte % 4 * 8)) & 255
    return (header % SCALES).to(tl.float32) / STEPS + octave, (header // SCALES).to(tl.float32)


@triton.jit
def load_words(rows, offset, valid, items, first, ITEMS: tl.constexpr):
    """The words [T, ITEMS] that hold the codes of items `first` to `first` + ITEMS."""
    # Neighbours mostly are neighbours: lanes of a warp should take them, not rows.
    word = tl.max_contiguous(tl.load(items + first + tl.arange(0, ITEMS)), ITEMS)
    return tl.load(rows + offset[:, None] + word[None, :], mask=valid[:, None], other=0)


@triton.jit
def number_of(code, centre):
    """Codes less their centres."""
    whole = (code | WHOLE).to(tl.float32, bitcast=True)  # conversions of integers are slow
    return whole - 8388608.0 - centre


@triton.jit
def numbers_of(words, items, first, total, ITEMS: tl.constexpr):
    """Codes less their centres, fp32 [T, 4 ITEMS], of what `load_words` gives: four of each
    word, one of every byte."""
    item = items + first + tl.arange(0, ITEMS)
    shift, keep = tl.load(item + total)[None, :], tl.load(item + 2 * total)[None, :]
    centre = keep.to(tl.float32) / 2
    a = number_of((words >> shift) & keep, centre)
    b = number_of((words >> (shift + 8)) & keep, centre)
    c = number_of((words >> (shift + 16)) & keep, centre)
    d = number_of((words >> (shift + 24)) & keep, centre)
    together = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(together, [words.shape[0], 4 * ITEMS])


AT_RUN_TIME = [
    "length",
    "positions",
    "window",
    "padded_columns",
    "pages_stride_b",
    "mask_stride_b",
    "key_stride_b",
    "key_stride_t",
    "value_stride_b",
    "value_stride_t",
    "header_k",
    "header_v",
]
"""Arguments that differ from call to call: kernels are not compiled anew for them."""


@triton.jit(do_not_specialize=AT_RUN_TIME)
def latent_weights_kernel(
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
    total,
    padded_columns,
    scale,
    softcap,
    window,
    octave_k,
    octave_v,
    header_k,
    header_v,
    epsilon,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,  # of rotary pairs
    PAIRS: tl.constexpr,  # of a head in a block
    PADDED: tl.constexpr,  # the same, padded
    HEADS: tl.constexpr,  # key/value heads of a span, padded
    SPANS: tl.constexpr,
    TOGETHER: tl.constexpr,  # whether the norm is that of all heads
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,  # of columns in a span
    CHUNK: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    MULTIPLE: tl.constexpr,
    SQUARES: tl.constexpr,  # type that squares are added up in
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Weights of one block of slots for the heads of one span.

    `weights_out` is [b, blocks, columns, T], `block_terms` [b, blocks, 4, columns]: the maximum of
    the scores (base 2), the sum of the weights, and those of the second class of values and of
    keys. Of blocks that nothing attends to these are −inf and zeros; weights are not written.
    """
    if OVERLAP:
        gdc_launch_dependents()
    block, batch = tl.program_id(0), tl.program_id(1)
    span, tile = tl.program_id(2) // TILES, tl.program_id(2) % TILES
    begin, stop = slot_bounds(start, end, length, positions, window, batch)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    bias, valid = load_bias(mask, batch, mask_stride_b, slot, begin, stop)

    shared = heads // GROUPS
    per_span = HEADS * shared * positions
    in_span = tile * COLUMNS + tl.arange(0, COLUMNS)
    column = span * per_span + in_span
    inside = (in_span < per_span) & (column < heads * positions)
    head, position = column // positions, column % positions
    of_span = head // shared - span * HEADS
    terms = block_terms + (batch * tl.num_programs(0) + block) * (4 * padded_columns) + column

    if tl.max(valid.to(tl.int32), 0) == 0:
        tl.store(terms, tl.full([COLUMNS], float("-inf"), tl.float32), mask=inside)
        for i in tl.static_range(1, 4):
            tl.store(terms + i * padded_columns, tl.zeros([COLUMNS], tl.float32), mask=inside)
    else:
        keys, key_offset = block_rows(
            keys,
            pages,
            batch,
            block,
            valid,
            pages_stride_b,
            key_stride_b,
            key_stride_t,
            PAGE,
            BLOCK,
        )
        header = load_header(keys, key_offset, valid, header_k)
        key_octave, key_class = header_of(header, octave_k, header_k)
        key_scale = tl.exp2(key_octave)
        any_class = tl.max(key_class, 0)  # hardly ever

        ALL: tl.constexpr = HEADS * PADDED  # pairs of a span
        DTYPE: tl.constexpr = query.dtype.element_ty
        ITEMS: tl.constexpr = CHUNK // 4
        pair = tl.arange(0, ALL)
        pair_head, in_head = pair // PADDED, pair % PADDED
        used = (in_head < PAIRS) & (span * HEADS + pair_head < GROUPS)
        mine = inside[:, None] & used[None, :] & (of_span[:, None] == pair_head[None, :])
        query += batch.to(tl.int64) * query_stride_b
        of_column = head * query_stride_h + position * query_stride_s
        in_block = tl.arange(0, BLOCK)
        one_head = tl.arange(0, PADDED)
        table = batch.to(tl.int64) * table_stride_b
        table += tl.cast(block, tl.int64) * BLOCK * table_stride_t
        cosine += table
        sine += table
        table = (in_block * table_stride_t)[None, :] + (one_head * table_stride_p)[:, None]
        known = (one_head < PAIRS)[:, None] & valid[None, :]

        scores = tl.zeros([COLUMNS, BLOCK], tl.float32)
        size = tl.zeros([COLUMNS, BLOCK], tl.float32)
        last_chunk = tl.load(chunks + BLOCKS)
        # What the next step takes apart is loaded before this one's products.
        words = load_words(keys, key_offset, valid, items, 0, ITEMS)
        for of_pairs in range(BLOCKS):
            of_key = offset + (of_pairs * SPANS + span) * (2 * ALL) + tl.arange(0, 2 * ALL)
            rebuilt = tl.zeros([2 * ALL, BLOCK], tl.float32) + tl.load(of_key)[:, None]
            if any_class > 0:
                more = tl.load(of_key + BLOCKS * SPANS * (2 * ALL))
                rebuilt += more[:, None] * key_class[None, :]
            first, last = tl.load(chunks + of_pairs), tl.load(chunks + of_pairs + 1)
            for chunk in tl.range(first, last, num_stages=STAGES):
                right = numbers_of(words, items, chunk * ITEMS, total, ITEMS) * key_scale[:, None]
                following = tl.minimum(chunk + 1, last_chunk - 1)
                words = load_words(keys, key_offset, valid, items, following * ITEMS, ITEMS)
                left = weight + (chunk * SPANS + span) * (2 * ALL * CHUNK)
                left += (tl.arange(0, 2 * ALL) * CHUNK)[:, None] + tl.arange(0, CHUNK)[None, :]
                right = tl.trans(right.to(DTYPE))
                rebuilt = tl.dot(tl.load(left), right, rebuilt, input_precision=PRECISION)
            parts = tl.permute(tl.reshape(rebuilt, [2, HEADS, PADDED, BLOCK]), [1, 2, 3, 0])
            a, b = tl.split(parts)
            if norm is not None:
                of_key = norm + (of_pairs * SPANS + span) * (2 * ALL) + pair
                gain = of_key + BLOCKS * SPANS * (2 * ALL)
                real, imaginary = tl.reshape(a, [ALL, BLOCK]), tl.reshape(b, [ALL, BLOCK])
                a = real * tl.load(of_key)[:, None]
                b = imaginary * tl.load(of_key + ALL)[:, None]
                counted = inside[:, None] & used[None, :] if TOGETHER else mine
                squares = (a * a + b * b).to(SQUARES)
                size = tl.dot(counted.to(SQUARES), squares, size, input_precision=PRECISION)
                a = tl.reshape(real * tl.load(gain)[:, None], [HEADS, PADDED, BLOCK])
                b = tl.reshape(imaginary * tl.load(gain + ALL)[:, None], [HEADS, PADDED, BLOCK])
            at = table + of_pairs * PAIRS * table_stride_p
            cos = tl.load(cosine + at, mask=known, other=0.0)[None, :, :].to(tl.float32)
            sin = tl.load(sine + at, mask=known, other=0.0)[None, :, :].to(tl.float32)
            of_query = of_column[:, None] + (of_pairs * PAIRS + in_head)[None, :]
            left = tl.load(query + of_query, mask=mine, other=0.0)
            turned = tl.reshape(a * cos - b * sin, [ALL, BLOCK]).to(DTYPE)
            scores = tl.dot(left, turned, scores, input_precision=PRECISION)
            left = tl.load(query + of_query + BLOCKS * PAIRS, mask=mine, other=0.0)
            turned = tl.reshape(b * cos + a * sin, [ALL, BLOCK]).to(DTYPE)
            scores = tl.dot(left, turned, scores, input_precision=PRECISION)

        if norm is not None:
            NUMBERS: tl.constexpr = 2 * BLOCKS * PAIRS * (GROUPS if TOGETHER else 1)
            scores *= tl.rsqrt(size / NUMBERS + epsilon)
        if softcap is not None:
            scores = softcap * tanh(scores * (scale / softcap)) * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        if mask is not None:
            scores += bias[None, :] * LOG2_E
        attended = valid[None, :]
        if MULTIPLE:  # several query positions, each with its own last slot
            own = (stop - positions + position)[:, None]
            attended = attended & (slot[None, :] <= own)
            if window is not None:
                attended = attended & (slot[None, :] > own - window)
        scores = tl.where(attended, scores, float("-inf"))
        highest = tl.max(scores, 1)
        weights = tl.exp2(scores - tl.where(highest == float("-inf"), 0.0, highest)[:, None])

        weights_out += (batch * tl.num_programs(0) + block).to(tl.int64) * padded_columns * BLOCK
        tl.store(
            weights_out + (column * BLOCK)[:, None] + in_block[None, :],
            weights.to(weights_out.dtype.element_ty),
            mask=inside[:, None],
        )
        tl.store(terms, highest, mask=inside)
        tl.store(terms + padded_columns, tl.sum(weights, 1), mask=inside)
        values, value_offset = block_rows(
            values,
            pages,
            batch,
            block,
            valid,
            pages_stride_b,
            value_stride_b,
            value_stride_t,
            PAGE,
            BLOCK,
        )
        header = load_header(values, value_offset, valid, header_v)
        _, value_class = header_of(header, octave_v, header_v)
        of_class = tl.sum(weights * value_class[None, :], 1)
        tl.store(terms + 2 * padded_columns, of_class, mask=inside)
        of_class = tl.sum(weights * key_class[None, :], 1)
        tl.store(terms + 3 * padded_columns, of_class, mask=inside)
