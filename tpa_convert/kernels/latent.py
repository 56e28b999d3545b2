"""Split-KV decoding over latent keys: rebuilt, normalised and rotated tile by tile.

A program holds all heads, so that what is cached is read once. Keys of one head after the other
are made of a tile of slots in the matrix unit,

    keys_j [T, d] = cached [T, w_k] · weight_jᵀ [w_k, d]

and meet all queries, of which those of other heads are zeros: that takes g times the products of
scores, few beside those that rebuild, and leaves the scores where values want them.
"""

# Triton's language has tuples that grow by addition only, and no types for them.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .split_kv import in_use, softmax_step, split_range


@triton.jit
def _load(rows, offset, valid, first, width, SIZE: tl.constexpr):
    """Components `first` to `first` + SIZE of rows at `offset` [T], as [T, SIZE]."""
    component = first + tl.arange(0, SIZE)[None, :]
    mask = valid[:, None] & (component < width)
    return tl.load(rows + offset[:, None] + component, mask=mask, other=0.0)


@triton.jit
def _half(
    features,
    weight,
    offset,
    first,
    width,
    pairs,
    CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Real or imaginary parts [T, PAIRS] of the keys of a head, from `first` on in its rows."""
    pair = tl.arange(0, PAIRS)
    used = pair < pairs
    rows = (first + pair) * width
    total = tl.zeros([features[0].shape[0], PAIRS], tl.float32)
    for i in tl.static_range(len(features)):
        part = _load(weight, rows, used, i * CHUNK, width, CHUNK)
        total = tl.dot(features[i], tl.trans(part), total, input_precision=PRECISION)
    return total + tl.load(offset + first + pair, mask=used, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["length", "positions", "window", "splits", "mask_stride_b"])
def latent_kernel(
    query,
    keys,
    values,
    weight,
    offset,
    cosine,
    sine,
    unscale,
    gain,
    partial,
    partial_lse,
    start,
    end,
    mask,
    mask_stride_b,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_t,
    value_stride_b,
    value_stride_t,
    table_stride_b,
    heads,
    positions,
    length,
    pairs,
    eighths_k,  # widths / 8: tells the compiler that loads of 8 do not cross their ends
    eighths_v,
    scale,
    softcap,
    window,
    epsilon,
    splits,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK_K: tl.constexpr,
    CHUNKS_K: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS_V: tl.constexpr,
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
    own = stop - positions + position

    query += tl.multiple_of(batch.to(tl.int64) * query_stride_b, ALIGN)
    of_column = tl.multiple_of(head * query_stride_h + position * query_stride_s, ALIGN)
    keys += tl.multiple_of(batch.to(tl.int64) * key_stride_b, ALIGN)
    values += tl.multiple_of(batch.to(tl.int64) * value_stride_b, ALIGN)
    cosine += batch.to(tl.int64) * table_stride_b
    sine += batch.to(tl.int64) * table_stride_b
    if mask is not None:
        mask += batch.to(tl.int64) * mask_stride_b
    pair = tl.arange(0, PAIRS)
    highest = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    outputs = ()
    for _ in tl.static_range(CHUNKS_V):
        outputs = outputs + (tl.zeros([CHUNK_V, COLUMNS], tl.float32),)

    for block in range(first, last, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        valid = in_use(slot, last, mask)
        key_offset = tl.multiple_of(slot.to(tl.int64) * key_stride_t, ALIGN)
        features = ()
        for i in tl.static_range(CHUNKS_K):
            features = features + (_load(keys, key_offset, valid, i * CHUNK_K, width_k, CHUNK_K),)
        table = slot.to(tl.int64) * pairs
        cos = _load(cosine, table, valid, 0, pairs, PAIRS)
        sin = _load(sine, table, valid, 0, pairs, PAIRS)
        scores = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for j in tl.range(0, GROUPS, num_stages=STAGES):
            of_head = weight + j * (2 * pairs * width_k)
            offset_j = offset + j * 2 * pairs
            real = _half(features, of_head, offset_j, 0, width_k, pairs, CHUNK_K, PAIRS, PRECISION)
            imaginary = _half(
                features, of_head, offset_j, pairs, width_k, pairs, CHUNK_K, PAIRS, PRECISION
            )
            if unscale is not None:
                used = pair < pairs
                of_real = real * tl.load(unscale + pair, mask=used, other=0.0)[None, :]
                of_imaginary = imaginary * tl.load(unscale + pairs + pair, mask=used, other=0.0)
                size = tl.sum(of_real * of_real, 1) + tl.sum(of_imaginary * of_imaginary, 1)
                size = tl.rsqrt(size / (2 * pairs) + epsilon)[:, None]
                real *= size * tl.load(gain + pair, mask=used, other=0.0)[None, :]
                imaginary *= size * tl.load(gain + pairs + pair, mask=used, other=0.0)[None, :]
            mine = inside & (group == j)
            query_real = _load(query, of_column, mine, 0, pairs, PAIRS)
            query_imaginary = _load(query + pairs, of_column, mine, 0, pairs, PAIRS)
            number = query.dtype.element_ty
            scores = tl.dot(
                (real * cos - imaginary * sin).to(number),
                tl.trans(query_real),
                scores,
                input_precision=PRECISION,
            )
            scores = tl.dot(
                (imaginary * cos + real * sin).to(number),
                tl.trans(query_imaginary),
                scores,
                input_precision=PRECISION,
            )
        weights, rescale, highest, total = softmax_step(
            scores, slot, valid, own, scale, softcap, window, highest, total, MULTIPLE
        )
        scaled = weights.to(values.dtype.element_ty)
        value_offset = tl.multiple_of(slot.to(tl.int64) * value_stride_t, ALIGN)
        updated = ()
        for i in tl.static_range(CHUNKS_V):
            value = _load(values, value_offset, valid, i * CHUNK_V, width_v, CHUNK_V)
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
