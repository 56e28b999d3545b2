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


@triton.jit
def block_rows(
    rows,
    pages,
    batch,
    block,
    valid,
    length,
    pages_stride_b,
    stride_b,
    stride_t,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A pointer, and offsets from it [T], of the rows in a block of slots, and of the last row
    again for those behind it: reading slots that nothing attends to is cheaper than asking which
    they are. Offsets of a cache in one piece are short: long ones would take twice the registers.
    """
    in_block = tl.minimum(tl.arange(0, BLOCK), length - 1 - block * BLOCK)
    if PAGE == 0:
        rows += batch.to(tl.int64) * stride_b + tl.cast(block, tl.int64) * BLOCK * stride_t
        offset = in_block * tl.cast(stride_t, tl.int32)
    else:
        slot = block * BLOCK + in_block
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
def load_header(rows, offset, octave, header_byte):
    """Scale [T] of each token, and 1 for those of the second class, in fp32."""
    return read_header(tl.load(rows + offset + header_byte // 4), octave, header_byte)


@triton.jit
def read_header(word, octave, header_byte):
    """The same, of the word [T] that the header is in."""
    header = (word >> (header_byte % 4 * 8)) & 255
    scale = tl.exp2((header % SCALES).to(tl.float32) / STEPS + octave)
    return scale, (header // SCALES).to(tl.float32)


@triton.jit
def load_words(rows, offset, item):
    """The words [T, I] that hold the codes of `item`s [I]."""
    # Neighbours mostly are neighbours: lanes of a warp should take them, not rows.
    word = tl.max_contiguous(item & 0xFFFF, item.shape[0])
    return tl.load(rows + offset[:, None] + word[None, :])


@triton.jit
def numbers_of(words, item, DTYPE: tl.constexpr):
    """Codes less their centres, exact in any type, [T, 4 I], of what `load_words` gives: four of
    each word, one of every byte.

    A code in the second bit and those above it is added to a number whose last bit is worth an
    eighth by being set in it, two codes at once.
    """
    words = words.to(tl.uint32, bitcast=True)
    keep = (item >> 24).to(tl.uint32)
    centre = keep.to(tl.float32) / 16
    turn = ((item >> 16) & 31).to(tl.uint32)
    both = (keep | (keep << 16))[None, :]
    turned = (words >> turn[None, :]) | (words << ((32 - turn) & 31)[None, :])
    codes = tl.join(turned & both, (turned >> 8) & both)  # of bytes 0 and 2, 1 and 3
    low, high = codes & 0xFFFF, codes >> 16
    if DTYPE == tl.float32:  # noqa: SIM300
        found = tl.join(low, high).to(tl.float32) / 8
    else:
        BASE: tl.constexpr = 16.0 if DTYPE == tl.bfloat16 else 128.0  # noqa: SIM300
        BITS: tl.constexpr = 0x4180 if DTYPE == tl.bfloat16 else 0x5800  # noqa: SIM300
        found = tl.join(low | BITS, high | BITS).to(tl.uint16).to(DTYPE, bitcast=True)
        centre += BASE
    centre = centre.to(DTYPE)[None, :]
    centre = tl.join(centre, centre)  # as codes are joined, which every layout allows
    found = found - tl.join(centre, centre)
    return tl.reshape(found, [words.shape[0], 4 * words.shape[1]])


@triton.jit
def halves(x):
    """The upper and the lower half of rows [2 N, T]."""
    HALF: tl.constexpr = x.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(x, [2, HALF, x.shape[1]]), [1, 2, 0]))


AT_RUN_TIME = [
    "length",
    "chunk_count",
    "positions",
    "window",
    "padded_columns",
    "pages_stride_b",
    "mask_stride_b",
    "key_stride_b",
    "key_stride_t",
    "value_stride_b",
    "value_stride_t",
    "table_rows",
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

    `weights_out` is [b, blocks, 2, columns, T]: weights times the scales of keys, and of values.
    `block_terms` [b, blocks, 4, columns] are the maximum of the scores (base 2) rounded up, so that
    factors between blocks are powers of two, the sum of the weights relative to it, and those of
    the second class of values and of keys. Of blocks that nothing attends to
    these are −inf and zeros.
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
    weights_out += (batch * tl.num_programs(0) + block).to(tl.int64) * (2 * padded_columns * BLOCK)
    of_weights = weights_out + (column * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    of_values = of_weights + padded_columns * BLOCK

    if tl.max(valid.to(tl.int32), 0) == 0:
        tl.store(terms, tl.full([COLUMNS], float("-inf"), tl.float32), mask=inside)
        for i in tl.static_range(1, 4):
            tl.store(terms + i * padded_columns, tl.zeros([COLUMNS], tl.float32), mask=inside)
        nothing = tl.zeros([COLUMNS, BLOCK], weights_out.dtype.element_ty)
        tl.store(of_weights, nothing, mask=inside[:, None])
        tl.store(of_values, nothing, mask=inside[:, None])
    else:
        keys, key_offset = block_rows(
            keys,
            pages,
            batch,
            block,
            valid,
            length,
            pages_stride_b,
            key_stride_b,
            key_stride_t,
            PAGE,
            BLOCK,
        )
        key_scale, key_class = load_header(keys, key_offset, octave_k, header_k)
        any_class = tl.max(key_class, 0)  # hardly ever
        # One register holds both: classes stand in the last bit of scales.
        key_scale = key_scale.to(tl.int32, bitcast=True) & -2 | key_class.to(tl.int32)
        key_scale = key_scale.to(tl.float32, bitcast=True)

        ALL: tl.constexpr = HEADS * PADDED  # pairs of a span
        LOW: tl.constexpr = PADDED if PADDED < 8 else 8  # pairs of a head that stand side by side
        HIGH: tl.constexpr = PADDED // LOW
        DTYPE: tl.constexpr = query.dtype.element_ty
        ITEMS: tl.constexpr = CHUNK // 4
        pair = tl.arange(0, ALL)
        pair_head = pair // LOW % HEADS
        in_head = pair // (LOW * HEADS) * LOW + pair % LOW
        used = (in_head < PAIRS) & (span * HEADS + pair_head < GROUPS)
        mine = inside[:, None] & used[None, :] & (of_span[:, None] == pair_head[None, :])
        query += batch.to(tl.int64) * query_stride_b
        of_column = head * query_stride_h + position * query_stride_s
        in_block = tl.minimum(tl.arange(0, BLOCK), length - 1 - block * BLOCK)
        one_head = tl.arange(0, PADDED)
        table = batch.to(tl.int64) * table_rows * table_stride_t
        table += tl.cast(block, tl.int64) * BLOCK * table_stride_t
        cosine += table
        sine += table
        table = (in_block * table_stride_t)[None, :] + (one_head * table_stride_p)[:, None]
        known = (one_head < PAIRS)[:, None]
        of_item = items + tl.arange(0, ITEMS)
        of_weight = (tl.arange(0, 2 * ALL) * CHUNK)[:, None] + tl.arange(0, CHUNK)[None, :]
        weight += span * (2 * ALL * CHUNK)

        scores = tl.zeros([COLUMNS, BLOCK], tl.float32)
        size = tl.zeros([COLUMNS, BLOCK], tl.float32)
        rebuilt = tl.zeros([2 * ALL, BLOCK], tl.float32)
        item = tl.load(of_item)
        words = load_words(keys, key_offset, item)
        for chunk in tl.range(0, chunk_count, num_stages=STAGES):
            of_pairs = tl.load(chunks + chunk)
            # What the next step takes apart is loaded before this one's products.
            right = numbers_of(words, item, DTYPE)
            item = tl.load(of_item + tl.minimum(chunk + 1, chunk_count - 1) * ITEMS)
            words = load_words(keys, key_offset, item)
            left = tl.load(weight + chunk * SPANS * (2 * ALL * CHUNK) + of_weight)
            rebuilt = tl.dot(left, tl.trans(right), rebuilt, input_precision=PRECISION)
            if tl.load(chunks + chunk + 1) > of_pairs:
                of_query = of_column[:, None] + (of_pairs * PAIRS + in_head)[None, :]
                real = tl.load(query + of_query, mask=mine, other=0.0)
                imaginary = tl.load(query + of_query + BLOCKS * PAIRS, mask=mine, other=0.0)
                at = table + of_pairs * PAIRS * table_stride_p
                cos = tl.load(cosine + at, mask=known, other=0.0)
                sin = tl.load(sine + at, mask=known, other=0.0)
                of_key = (of_pairs * SPANS + span) * (2 * ALL) + pair
                of_offset = offset + of_key
                a, b = halves(rebuilt)
                a = a * key_scale[None, :] + tl.load(of_offset)[:, None]
                b = b * key_scale[None, :] + tl.load(of_offset + ALL)[:, None]
                if any_class > 0:
                    of_offset += BLOCKS * SPANS * (2 * ALL)
                    its_class = (key_scale.to(tl.int32, bitcast=True) & 1).to(tl.float32)
                    a += tl.load(of_offset)[:, None] * its_class[None, :]
                    b += tl.load(of_offset + ALL)[:, None] * its_class[None, :]
                if norm is not None:
                    of_norm = norm + of_key
                    real_part = a * tl.load(of_norm)[:, None]
                    imaginary_part = b * tl.load(of_norm + ALL)[:, None]
                    counted = inside[:, None] & used[None, :] if TOGETHER else mine
                    squares = (real_part * real_part + imaginary_part * imaginary_part).to(SQUARES)
                    size = tl.dot(counted.to(SQUARES), squares, size, input_precision=PRECISION)
                    of_norm += BLOCKS * SPANS * (2 * ALL)
                    a *= tl.load(of_norm)[:, None]
                    b *= tl.load(of_norm + ALL)[:, None]
                # In the type of the source, which rotates its keys in it too.
                a = tl.reshape(a.to(DTYPE), [HIGH, HEADS, LOW, BLOCK])
                b = tl.reshape(b.to(DTYPE), [HIGH, HEADS, LOW, BLOCK])
                c = tl.reshape(cos.to(DTYPE), [HIGH, 1, LOW, BLOCK])
                d = tl.reshape(sin.to(DTYPE), [HIGH, 1, LOW, BLOCK])
                turned = tl.reshape(a * c - b * d, [ALL, BLOCK])
                scores = tl.dot(real, turned, scores, input_precision=PRECISION)
                turned = tl.reshape(b * c + a * d, [ALL, BLOCK])
                scores = tl.dot(imaginary, turned, scores, input_precision=PRECISION)
                rebuilt = tl.zeros([2 * ALL, BLOCK], tl.float32)

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
        highest = tl.ceil(tl.max(scores, 1))
        weights = tl.exp2(scores - tl.where(highest == float("-inf"), 0.0, highest)[:, None])

        tl.store(terms, highest, mask=inside)
        tl.store(terms + padded_columns, tl.sum(weights, 1), mask=inside)
        values, value_offset = block_rows(
            values,
            pages,
            batch,
            block,
            valid,
            length,
            pages_stride_b,
            value_stride_b,
            value_stride_t,
            PAGE,
            BLOCK,
        )
        value_scale, value_class = load_header(values, value_offset, octave_v, header_v)
        key_scale, key_class = load_header(keys, key_offset, octave_k, header_k)
        WEIGHT: tl.constexpr = weights_out.dtype.element_ty
        scaled = (weights * key_scale[None, :]).to(WEIGHT)
        tl.store(of_weights, scaled, mask=inside[:, None])
        scaled = (weights * value_scale[None, :]).to(WEIGHT)
        tl.store(of_values, scaled, mask=inside[:, None])
        of_value_class = tl.zeros([COLUMNS], tl.float32)
        of_key_class = tl.zeros([COLUMNS], tl.float32)
        if tl.max(key_class + value_class, 0) > 0:
            of_value_class = tl.sum(weights * value_class[None, :], 1)
            of_key_class = tl.sum(weights * key_class[None, :], 1)
        tl.store(terms + 2 * padded_columns, of_value_class, mask=inside)
        tl.store(terms + 3 * padded_columns, of_key_class, mask=inside)
