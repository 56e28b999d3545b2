"""Split-KV decoding over coded rows: the matrix unit works on the codes as they are.

With v what `unpack` makes of a code, a component is mean[class, c] + scale · gain_c (v − centre_c).
Gains, centres and means of keys are folded into the queries (`fold_kernel`), those of values are
applied to the output (`join_coded_kernel`), so that codes are only moved into the mantissas of fp16
numbers.

Rows are read as int16 words, in chunks described by tuples of constants: BITS, WORD (offset in the
row), SIZE (words, a power of two) and USED (words of them that are not padding). Chunk after chunk,
field after field and word after word give the order of a `place`; tables map places to components.
"""

# Triton's language has tuples that grow by addition only, and no types for them.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .split_kv import in_use, softmax_step, split_range
from .unpack import unpack


@triton.constexpr_function
def chunk_places(bits, size, chunk):
    """The first place of a chunk."""
    return sum(s * 16 // b for b, s in zip(bits[:chunk], size[:chunk], strict=True))


@triton.jit
def fold_kernel(
    query,
    folded,
    terms,
    component_of,
    gain,
    mean,
    centre,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    positions,
    places,
    width,
    CLASSES: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Folds the tables of the keys into the queries, one row a program.

    `folded` [b, rows, places] fp16 becomes query · gain / γ, γ being its largest magnitude, and
    `terms` [b, 2 + CLASSES, rows] γ, the sum of folded · centre, and query · mean of each class.
    """
    if OVERLAP:
        gdc_launch_dependents()
    row, batch = tl.program_id(0), tl.program_id(1)
    rows = tl.num_programs(0)
    query += batch.to(tl.int64) * query_stride_b
    query += row // positions * query_stride_h + row % positions * query_stride_s
    largest = tl.zeros([CHUNK], tl.float32)
    for first in range(0, places, CHUNK):
        place = first + tl.arange(0, CHUNK)
        component = tl.load(component_of + place, mask=place < places, other=0)
        number = tl.load(query + component).to(tl.float32)
        number *= tl.load(gain + place, mask=place < places, other=0.0)
        largest = tl.maximum(largest, tl.abs(number))
    norm = tl.max(largest, 0)
    inverse = 1 / tl.where(norm == 0, 1.0, norm)
    folded += (batch * rows + row).to(tl.int64) * places
    bias = tl.zeros([CHUNK], tl.float32)
    for first in range(0, places, CHUNK):
        place = first + tl.arange(0, CHUNK)
        used = place < places
        component = tl.load(component_of + place, mask=used, other=0)
        number = tl.load(query + component).to(tl.float32)
        half = (number * tl.load(gain + place, mask=used, other=0.0) * inverse).to(tl.float16)
        tl.store(folded + place, half, mask=used)
        bias += half.to(tl.float32) * tl.load(centre + place, mask=used, other=0.0)
    terms += batch * (2 + CLASSES) * rows + row
    tl.store(terms, norm)
    tl.store(terms + rows, tl.sum(bias, 0))
    for i in tl.static_range(CLASSES):
        constant = tl.zeros([CHUNK], tl.float32)
        for first in range(0, width, CHUNK):
            component = first + tl.arange(0, CHUNK)
            used = component < width
            number = tl.load(query + component, mask=used, other=0.0).to(tl.float32)
            constant += number * tl.load(mean + i * width + component, mask=used, other=0.0)
        tl.store(terms + (2 + i) * rows, tl.sum(constant, 0))


@triton.jit
def load_header(
    rows, offset, valid, octave, WORD: tl.constexpr, SHIFT: tl.constexpr, CLASSES: tl.constexpr
):
    """Scale of each token and its class, from a byte of the row."""
    # Four bytes at a time, the least that an asynchronous copy takes.
    pointer = (rows + offset + WORD).to(tl.pointer_type(tl.int32))
    header = (tl.load(pointer, mask=valid, other=0) >> SHIFT) & 255
    steps = header & (256 // CLASSES - 1)
    return tl.exp2(steps.to(tl.float32) * 0.125 + octave), header // (256 // CLASSES)


@triton.jit
def _load_keys(rows, offset, valid, WORD: tl.constexpr, SIZE: tl.constexpr, USED: tl.constexpr):
    """Words of keys, [T, SIZE]."""
    word = tl.arange(0, SIZE)[None, :]
    mask = valid[:, None]
    if SIZE > USED:
        mask = mask & (word < USED)
    return tl.load(rows + offset[:, None] + (WORD + word), mask=mask, other=0)


@triton.jit
def _load_values(rows, offset, valid, WORD: tl.constexpr, SIZE: tl.constexpr, USED: tl.constexpr):
    """Words of values, transposed: [SIZE, T]."""
    word = tl.arange(0, SIZE)[:, None]
    mask = valid[None, :]
    if SIZE > USED:
        mask = mask & (word < USED)
    return tl.load(rows + offset[None, :] + (WORD + word), mask=mask, other=0)


@triton.jit
def _load_queries(
    folded, row, inside, FIRST: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr
):
    """A tuple of COUNT tensors [SIZE, C], one for each field of a chunk."""
    queries = ()
    for i in tl.static_range(COUNT):
        place = FIRST + i * SIZE + tl.arange(0, SIZE)[None, :]
        part = tl.load(folded + row[:, None] + place, mask=inside[:, None], other=0.0)
        queries = queries + (tl.trans(part),)
    return queries


@triton.jit
def _zeros(SIZE: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    outputs = ()
    for _ in tl.static_range(COUNT):
        outputs = outputs + (tl.zeros([SIZE, COLUMNS], tl.float32),)
    return outputs


@triton.jit
def _add_scores(words, queries, scores, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    for i in tl.static_range(16 // BITS):
        scores = tl.dot(unpack(words, i, BITS, ASSEMBLY), queries[i], scores)
    return scores


@triton.jit
def _add_outputs(words, weights, rescale, outputs, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    updated = ()
    for i in tl.static_range(16 // BITS):
        number = unpack(words, i, BITS, ASSEMBLY)
        updated = updated + (tl.dot(number, weights, outputs[i] * rescale[None, :]),)
    return updated


@triton.jit
def _store_outputs(
    partial, row, inside, outputs, FIRST: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr
):
    for i in tl.static_range(COUNT):
        place = FIRST + i * SIZE + tl.arange(0, SIZE)[:, None]
        tl.store(partial + row[None, :] + place, outputs[i], mask=inside[None, :])


@triton.jit(do_not_specialize=["length", "positions", "window", "splits", "mask_stride_b"])
def coded_kernel(
    folded,
    column_terms,
    keys,
    values,
    partial,
    partial_terms,
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
    places_k,
    places_v,
    scale,
    softcap,
    window,
    splits,
    BITS_K: tl.constexpr,
    WORD_K: tl.constexpr,
    SIZE_K: tl.constexpr,
    USED_K: tl.constexpr,
    HEADER_K: tl.constexpr,
    SHIFT_K: tl.constexpr,
    CLASSES_K: tl.constexpr,
    BITS_V: tl.constexpr,
    WORD_V: tl.constexpr,
    SIZE_V: tl.constexpr,
    USED_V: tl.constexpr,
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
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    split, batch, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    first, last, stop = split_range(
        start, end, length, positions, window, batch, split, splits, BLOCK
    )
    own = stop - positions + column % positions

    row = (batch * columns + column) * places_k
    column_terms += batch * (2 + CLASSES_K) * columns + column
    norm = tl.load(column_terms, mask=inside, other=0.0)
    bias = tl.load(column_terms + columns, mask=inside, other=0.0)
    constants = ()
    for i in tl.static_range(CLASSES_K):
        constants = constants + (tl.load(column_terms + (2 + i) * columns, mask=inside, other=0.0),)
    queries = ()
    for i in tl.static_range(len(BITS_K)):
        queries = queries + (
            _load_queries(
                folded, row, inside, chunk_places(BITS_K, SIZE_K, i), SIZE_K[i], 16 // BITS_K[i]
            ),
        )

    keys += tl.multiple_of(batch.to(tl.int64) * key_stride_b, ALIGN)
    values += tl.multiple_of(batch.to(tl.int64) * value_stride_b, ALIGN)
    if mask is not None:
        mask += batch.to(tl.int64) * mask_stride_b
    highest = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    weight_sum = tl.zeros([COLUMNS], tl.float32)
    class_sums = ()
    for _ in tl.static_range(1, CLASSES_V):
        class_sums = class_sums + (tl.zeros([COLUMNS], tl.float32),)
    outputs = ()
    for i in tl.static_range(len(BITS_V)):
        outputs = outputs + (_zeros(SIZE_V[i], COLUMNS, 16 // BITS_V[i]),)

    for block in tl.range(first, last, BLOCK, num_stages=STAGES):
        slot = block + tl.arange(0, BLOCK)
        valid = in_use(slot, last, mask)
        key_offset = tl.multiple_of(slot.to(tl.int64) * key_stride_t, ALIGN)
        key_scale, key_class = load_header(
            keys, key_offset, valid, octave_k, HEADER_K, SHIFT_K, CLASSES_K
        )
        scores = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for i in tl.static_range(len(BITS_K)):
            words = _load_keys(keys, key_offset, valid, WORD_K[i], SIZE_K[i], USED_K[i])
            scores = _add_scores(words, queries[i], scores, BITS_K[i], ASSEMBLY)
        scores = (scores - bias[None, :]) * key_scale[:, None] * norm[None, :]
        constant = constants[0][None, :]
        for i in tl.static_range(1, CLASSES_K):
            constant = tl.where((key_class == i)[:, None], constants[i][None, :], constant)
        scores += constant

        weights, rescale, highest, total = softmax_step(
            scores, slot, valid, own, scale, softcap, window, highest, total, MULTIPLE
        )
        value_offset = tl.multiple_of(slot.to(tl.int64) * value_stride_t, ALIGN)
        value_scale, value_class = load_header(
            values, value_offset, valid, octave_v, HEADER_V, SHIFT_V, CLASSES_V
        )
        scaled = (weights * value_scale[:, None]).to(tl.float16)
        weight_sum = weight_sum * rescale + tl.sum(scaled.to(tl.float32), 0)
        new_sums = ()
        for i in tl.static_range(1, CLASSES_V):
            of_class = tl.where((value_class == i)[:, None], weights, 0.0)
            new_sums = new_sums + (class_sums[i - 1] * rescale + tl.sum(of_class, 0),)
        class_sums = new_sums
        updated = ()
        for i in tl.static_range(len(BITS_V)):
            value_words = _load_values(values, value_offset, valid, WORD_V[i], SIZE_V[i], USED_V[i])
            updated = updated + (
                _add_outputs(value_words, scaled, rescale, outputs[i], BITS_V[i], ASSEMBLY),
            )
        outputs = updated

    partial_terms += (batch * splits + split) * (2 + CLASSES_V) * columns + column
    tl.store(partial_terms, tl.where(highest == float("-inf"), 0.0, highest), mask=inside)
    tl.store(partial_terms + columns, weight_sum, mask=inside)
    tl.store(partial_terms + 2 * columns, total, mask=inside)
    for i in tl.static_range(1, CLASSES_V):
        tl.store(partial_terms + (2 + i) * columns, class_sums[i - 1], mask=inside)
    row = ((batch * splits + split) * columns + column).to(tl.int64) * places_v
    for i in tl.static_range(len(BITS_V)):
        _store_outputs(
            partial,
            row,
            inside,
            outputs[i],
            chunk_places(BITS_V, SIZE_V, i),
            SIZE_V[i],
            16 // BITS_V[i],
        )


@triton.jit(do_not_specialize=["splits"])
def join_coded_kernel(
    partial,
    partial_terms,
    output,
    place_of,
    gain,
    mean,
    centre,
    columns,
    places,
    width,
    splits,
    CLASSES: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Joins the splits of one row and applies the tables of the values.

    `partial` is [b, splits, rows, places] and `partial_terms` [b, splits, 2 + CLASSES, rows]: what
    scores are relative to, the sum of the weights times the scales of values, the sum of the
    weights, and that of each class but the first. A component lies in up to PARTS places,
    `place_of` [PARTS, width], -1 for none.
    """
    if OVERLAP:
        gdc_wait()
    row, batch = tl.program_id(0), tl.program_id(2)
    component = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    used = component < width
    stride = (2 + CLASSES) * columns
    partial_terms += batch * splits * stride + row
    partial += (batch * splits * columns + row).to(tl.int64) * places

    # Splits without weights stand for nothing, whatever their shift.
    highest = float("-inf")
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        shift = tl.load(partial_terms + split * stride, mask=split < splits, other=float("-inf"))
        total = tl.load(
            partial_terms + split * stride + 2 * columns, mask=split < splits, other=0.0
        )
        highest = tl.maximum(highest, tl.max(tl.where(total > 0, shift, float("-inf")), 0))
    highest = tl.where(highest == float("-inf"), 0.0, highest)

    base = tl.load(mean + component, mask=used, other=0.0)
    denominator = 0.0
    result = tl.zeros([CHUNK], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        terms = partial_terms + split * stride
        total = tl.load(terms + 2 * columns, mask=split < splits, other=0.0)
        valid = total > 0
        factor = tl.exp2(tl.load(terms, mask=valid, other=float("-inf")) - highest)
        denominator += tl.sum(total * factor, 0)
        scaled = tl.sum(tl.load(terms + columns, mask=valid, other=0.0) * factor, 0)
        for i in tl.static_range(PARTS):
            place = tl.load(place_of + i * width + component, mask=used, other=-1)
            here = place >= 0
            # Components first: neighbours lie side by side, though the compiler cannot know.
            part = tl.load(
                partial + place[:, None] + (split.to(tl.int64) * columns * places)[None, :],
                mask=here[:, None] & valid[None, :],
                other=0.0,
            )
            middle = tl.load(centre + place, mask=here, other=0.0)
            scale = tl.load(gain + place, mask=here, other=0.0)
            result += scale * (tl.sum(factor[None, :] * part, 1) - middle * scaled)
        for i in tl.static_range(1, CLASSES):
            of_class = tl.load(terms + (2 + i) * columns, mask=valid, other=0.0)
            difference = tl.load(mean + i * width + component, mask=used, other=0.0) - base
            result += difference * tl.sum(of_class * factor, 0)
    result = tl.where(
        denominator == 0, 0.0, result / tl.where(denominator == 0, 1.0, denominator) + base
    )
    tl.store(output + (batch * columns + row).to(tl.int64) * width + component, result, mask=used)
