"""Weights of latent keys: rows of codes or numbers to keys to softmax, block of slots by block.

A program holds some heads and a block of slots. Block by block of rotary pairs it takes the rows
apart, rebuilds the keys, rotates them and adds their products with the queries:

    keysᵀ [pairs, T] = weight [pairs, w] · componentsᵀ [w, T]        for real and imaginary parts
    scores [C, T] += queries [C, pairs] · rotated keysᵀ [pairs, T]

Weights go through memory, relative to the maximum of their block of slots; `latent_sums.py` sums
what they weigh.

What is computed stands on the right of every product. Its left side, where Hopper's matrix unit
could take it from registers, is always something loaded: assemblers before CUDA 13.3 reuse such
registers while the unit still reads them, which gives wrong results (triton-lang/triton#11781).
"""

# Triton's language has tuples that grow by addition only, and no types for them.
# ruff: noqa: RUF005
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
def load_header(rows, offset, valid, octave, header_byte):
    """Scale [T] of each token, and 1 for those of the second class, both fp32."""
    header = tl.load(rows + offset + header_byte, mask=valid, other=0).to(tl.int32)
    scale = tl.exp2((header % SCALES).to(tl.float32) / STEPS + octave)
    return scale, (header // SCALES).to(tl.float32)


@triton.jit
def load_places(
    rows, offset, valid, fields, first, total, PARTS: tl.constexpr, CHUNK: tl.constexpr
):
    """What the rows hold in places `first` to `first` + CHUNK, a tuple of [T, CHUNK] for the parts
    of a code: bytes, or numbers."""
    loaded = ()
    for part in tl.static_range(PARTS):
        field = fields + part * 4 * total + first + tl.arange(0, CHUNK)
        used = tl.load(field + 2 * total) > 0
        loaded = loaded + (
            tl.load(
                rows + offset[:, None] + tl.load(field)[None, :],
                mask=valid[:, None] & used[None, :],
                other=0,
            ),
        )
    return loaded


@triton.jit
def components_of(
    loaded,
    fields,
    centre,
    first,
    total,
    CODED: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Components [T, CHUNK] in units of their steps and scales, of what `load_places` gives."""
    if CODED:
        place = first + tl.arange(0, CHUNK)
        code = tl.zeros(loaded[0].shape, tl.int32)
        for part in tl.static_range(PARTS):
            field = fields + part * 4 * total + place
            down, keep, up = (
                tl.load(field + total),
                tl.load(field + 2 * total),
                tl.load(field + 3 * total),
            )
            code += ((loaded[part].to(tl.int32) >> down[None, :]) & keep[None, :]) << up[None, :]
        # Conversions of integers are slow.
        number = (code | WHOLE).to(tl.float32, bitcast=True) - 8388608.0
        return number - tl.load(centre + place)[None, :]
    else:
        return loaded[0]


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
    fields,
    centre,
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
    places,
    padded_columns,
    scale,
    softcap,
    window,
    octave_k,
    octave_v,
    header_k,
    header_v,
    epsilon,
    CODED: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,  # of rotary pairs
    PAIRS: tl.constexpr,  # of a head in a block
    HEADS: tl.constexpr,  # key/value heads of a span
    SPANS: tl.constexpr,
    PADDED: tl.constexpr,  # pairs of a span
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

    `weights_out` is [b, t, columns], `block_terms` [b, blocks, terms, columns]: the maximum of the
    scores (base 2), the sum of the weights, and of coded rows those of the second class of values
    and of keys. Blocks that nothing attends to have the maximum −inf and no weights.
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
    TERMS: tl.constexpr = 4 if CODED else 2
    terms = (batch * tl.num_programs(0) + block) * (TERMS * padded_columns) + column
    terms = block_terms + terms

    if tl.max(valid.to(tl.int32), 0) == 0:
        tl.store(terms, tl.full([COLUMNS], float("-inf"), tl.float32), mask=inside)
        for i in tl.static_range(1, TERMS):
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
        if CODED:
            key_scale, key_class = load_header(keys, key_offset, valid, octave_k, header_k)

        pair = tl.arange(0, PADDED)
        pair_head, in_head = pair // PAIRS, pair % PAIRS
        used = (pair_head < HEADS) & (span * HEADS + pair_head < GROUPS)
        mine = inside[:, None] & used[None, :] & (of_span[:, None] == pair_head[None, :])
        query += batch.to(tl.int64) * query_stride_b
        of_column = head * query_stride_h + position * query_stride_s
        in_block = tl.arange(0, BLOCK)
        table = (
            batch.to(tl.int64) * table_stride_b + tl.cast(block, tl.int64) * BLOCK * table_stride_t
        )
        cosine += table
        sine += table
        table = in_block * table_stride_t
        known = used[:, None] & valid[None, :]
        SIZE: tl.constexpr = SPANS * PADDED  # pairs of all spans
        of_pair = span * PADDED + pair

        scores = tl.zeros([COLUMNS, BLOCK], tl.float32)
        size = tl.zeros([COLUMNS, BLOCK], tl.float32)
        last_chunk = tl.load(chunks + BLOCKS)
        # What the next step takes apart is loaded before this one's products.
        loaded = load_places(keys, key_offset, valid, fields, 0, places, PARTS, CHUNK)
        for of_pairs in range(BLOCKS):
            real = tl.zeros([PADDED, BLOCK], tl.float32)
            imaginary = tl.zeros([PADDED, BLOCK], tl.float32)
            first, last = tl.load(chunks + of_pairs), tl.load(chunks + of_pairs + 1)
            for chunk in tl.range(first, last, num_stages=STAGES):
                found = components_of(
                    loaded, fields, centre, chunk * CHUNK, places, CODED, PARTS, CHUNK
                )
                following = tl.minimum(chunk + 1, last_chunk - 1) * CHUNK
                loaded = load_places(
                    keys, key_offset, valid, fields, following, places, PARTS, CHUNK
                )
                place = chunk * CHUNK + tl.arange(0, CHUNK)
                of_place = weight + (place * (2 * SIZE))[:, None] + of_pair[None, :]
                right = tl.trans(found.to(weight.dtype.element_ty))
                real = tl.dot(tl.trans(tl.load(of_place)), right, real, input_precision=PRECISION)
                imaginary = tl.dot(
                    tl.trans(tl.load(of_place + SIZE)), right, imaginary, input_precision=PRECISION
                )
            of_key = of_pairs * (2 * SIZE) + of_pair
            if CODED:
                real *= key_scale[None, :]
                imaginary *= key_scale[None, :]
                more_offset = offset + BLOCKS * (2 * SIZE) + of_key
                real += tl.load(more_offset)[:, None] * key_class[None, :]
                imaginary += tl.load(more_offset + SIZE)[:, None] * key_class[None, :]
            real += tl.load(offset + of_key)[:, None]
            imaginary += tl.load(offset + of_key + SIZE)[:, None]
            if norm is not None:
                a = real * tl.load(norm + of_key)[:, None]
                b = imaginary * tl.load(norm + of_key + SIZE)[:, None]
                counted = inside[:, None] & used[None, :] if TOGETHER else mine
                squares = (a * a + b * b).to(SQUARES)
                size = tl.dot(counted.to(SQUARES), squares, size, input_precision=PRECISION)
                gain = norm + BLOCKS * (2 * SIZE) + of_key
                real *= tl.load(gain)[:, None]
                imaginary *= tl.load(gain + SIZE)[:, None]
            at = table[None, :] + ((of_pairs * PAIRS + in_head) * table_stride_p)[:, None]
            cos = tl.load(cosine + at, mask=known, other=0.0).to(tl.float32)
            sin = tl.load(sine + at, mask=known, other=0.0).to(tl.float32)
            of_query = of_column[:, None] + (of_pairs * PAIRS + in_head)[None, :]
            left = tl.load(query + of_query, mask=mine, other=0.0)
            turned = (real * cos - imaginary * sin).to(query.dtype.element_ty)
            scores = tl.dot(left, turned, scores, input_precision=PRECISION)
            left = tl.load(query + of_query + BLOCKS * PAIRS, mask=mine, other=0.0)
            turned = (imaginary * cos + real * sin).to(query.dtype.element_ty)
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

        weights_out += (batch.to(tl.int64) * length + block * BLOCK) * padded_columns
        tl.store(
            weights_out + (in_block * padded_columns)[None, :] + column[:, None],
            weights.to(weights_out.dtype.element_ty),
            mask=inside[:, None] & (slot < length)[None, :],
        )
        tl.store(terms, highest, mask=inside)
        tl.store(terms + padded_columns, tl.sum(weights, 1), mask=inside)
        if CODED:
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
            _, value_class = load_header(values, value_offset, valid, octave_v, header_v)
            of_class = tl.sum(weights * value_class[None, :], 1)
            tl.store(terms + 2 * padded_columns, of_class, mask=inside)
            of_class = tl.sum(weights * key_class[None, :], 1)
            tl.store(terms + 3 * padded_columns, of_class, mask=inside)
