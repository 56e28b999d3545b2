"""Split-KV decoding over latent keys: rebuilt, normalised and rotated tile by tile.

A program holds all heads, so that what is cached is read once. Keys of a few heads after the
others are made of a tile of slots in the matrix unit,

    keys_j [T, d] = cached [T, w_k] · weight_jᵀ [w_k, d]

and meet all queries, of which those of other heads are zeros: that takes g times the products of
scores, few beside those that rebuild, and leaves the scores where values want them. Real and
imaginary parts of a rotary pair stand side by side, as one thread holds them, so that rotating
moves nothing.
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
    PAIRS: tl.constexpr,  # of a head, padded
    JOINT: tl.constexpr,  # heads whose keys are made at a time
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
    # Columns of keys: heads, their pairs, the two parts of each.
    SIZE: tl.constexpr = JOINT * 2 * PAIRS
    number = tl.arange(0, SIZE)
    joint, pair, part = number // (2 * PAIRS), number % (2 * PAIRS) // 2, number % 2
    used = pair < pairs
    of_key = joint * 2 * pairs + part * pairs + pair
    turned = tl.arange(0, SIZE // 2) % PAIRS
    highest = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    outputs = ()
    for _ in tl.static_range(CHUNKS_V):
        outputs = outputs + (tl.zeros([CHUNK_V, COLUMNS], tl.float32),)

    for block in tl.range(first, last, BLOCK, num_stages=1):
        slot = block + tl.arange(0, BLOCK)
        valid = in_use(slot, last, mask)
        key_offset = tl.multiple_of(slot.to(tl.int64) * key_stride_t, ALIGN)
        features = ()
        for i in tl.static_range(CHUNKS_K):
            features = features + (_load(keys, key_offset, valid, i * CHUNK_K, width_k, CHUNK_K),)
        table = (slot.to(tl.int64) * pairs)[:, None] + turned[None, :]
        known = valid[:, None] & (turned < pairs)[None, :]
        cos = tl.load(cosine + table, mask=known, other=0.0)
        sin = tl.load(sine + table, mask=known, other=0.0)
        scores = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for step in tl.range(0, GROUPS // JOINT, num_stages=STAGES):
            first_key = step * (JOINT * 2) * pairs
            rows = (first_key + of_key) * width_k
            key = tl.zeros([BLOCK, SIZE], tl.float32)
            for i in tl.static_range(CHUNKS_K):
                of_heads = _load(weight, rows, used, i * CHUNK_K, width_k, CHUNK_K)
                key = tl.dot(features[i], tl.trans(of_heads), key, input_precision=PRECISION)
            key += tl.load(offset + first_key + of_key, mask=used, other=0.0).to(tl.float32)[
                None, :
            ]
            if unscale is not None:  # then JOINT is 1
                unscaled = key * tl.load(unscale + of_key, mask=used, other=0.0)[None, :]
                size = tl.sum(unscaled * unscaled, 1) / (2 * pairs)
                key *= tl.rsqrt(size + epsilon)[:, None]
                key *= tl.load(gain + of_key, mask=used, other=0.0)[None, :]
            real, imaginary = tl.split(tl.reshape(key, (BLOCK, SIZE // 2, 2)))
            turned_key = tl.join(real * cos - imaginary * sin, imaginary * cos + real * sin)
            turned_key = tl.reshape(turned_key, (BLOCK, SIZE)).to(query.dtype.element_ty)
            mine = inside[:, None] & (group[:, None] == (step * JOINT + joint)[None, :])
            queries = tl.load(
                query + of_column[:, None] + (number % (2 * PAIRS))[None, :], mask=mine, other=0.0
            )
            scores = tl.dot(turned_key, tl.trans(queries), scores, input_precision=PRECISION)
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
