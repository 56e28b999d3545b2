"""The Triton kernel that makes codes and rows of components: a few whole tokens a program, in
registers. Programs behind them rotate the queries of the same tokens, which saves a launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .encode_reference import PLANES, SCALES_PER_OCTAVE, TRIED_STEPS
from .launch_rotation import rotate_rows

FIRST_TRIED = tl.constexpr(TRIED_STEPS.start)
TRIED_STEP = tl.constexpr(TRIED_STEPS.step)
TRIED = tl.constexpr(len(TRIED_STEPS))
STEPS = tl.constexpr(SCALES_PER_OCTAVE)
AT_MOST = tl.constexpr(PLANES)
WHOLE = tl.constexpr(2.0**23)  # from here on fp32 numbers are whole


@triton.jit
def round_to_even(x):
    """The nearest integer of 0 ≤ x < 2^22, the even one of two: as PyTorch rounds."""
    return (x + WHOLE) - WHOLE


@triton.jit
def code_of(u, reach):
    """The nearest code, fp32."""
    return round_to_even(tl.minimum(tl.maximum(u + reach, 0.0), 2 * reach))


@triton.jit(
    do_not_specialize=[
        "rows",
        "query_rows",
        "table_rows",
        "packed_first",
        "packed_stride",
        "together",
    ]
)
def encode_kernel(
    x,
    numbers_of,
    header,
    codes,
    scaled,
    inside,
    label,
    packed,
    places,
    query,
    cosine,
    sine,
    rotated,
    rows,
    query_rows,
    table_rows,
    packed_first,
    packed_stride,
    together,
    stride,
    scaled_stride,
    width,
    bytes,
    header_at,
    octave,
    heads,
    CLASSES: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BYTES: tl.constexpr,
    FEATURES: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """`encode_reference.encode_components` of `rows` tokens, `stride` numbers apart, by the tensors
    of `encode_reference.RowCodes`.

    Of the outputs those are written that are not None: `header`, `codes`, `scaled` (in rows
    `scaled_stride` apart, numbers of two bytes or more), `label`, `inside`, and `packed`, which is
    `encode_reference.pack` of codes that wait where `scaled` will be; its rows begin at
    `packed_first`, so many as are `together` side by side, and the next so many `packed_stride`
    bytes from there. Without `label`, the class is written behind each row of `scaled`, and zeros
    behind it up to a multiple of FEATURES. `rotated` is what `rotate_rows` makes of `query`,
    QUERIES rows a program.
    """
    program = tl.program_id(0)
    if rotated is not None:
        coders = tl.cdiv(rows, ROWS)
        if program >= coders:
            first = (program - coders) * QUERIES
            rotate_rows(
                first,
                query,
                cosine,
                sine,
                rotated,
                query_rows,
                table_rows,
                heads,
                heads * 2 * PAIRS,
                PAIRS,
                PADDED,
                QUERIES,
            )
            return
    mean = numbers_of
    step = mean + CLASSES * width
    spread = step + width
    importance = spread + width
    reach = importance + width
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    used = column < width
    mask = (row < rows)[:, None] & used[None, :]
    of_row = row.to(tl.int64)[:, None]
    numbers = tl.load(x + of_row * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)

    # Columns beyond the width are 0 ± 0 · step, of no importance.
    weight = tl.load(importance + column, mask=used, other=0.0)
    centred = numbers - tl.load(mean + column, mask=used, other=0.0)[None, :]
    kind = tl.zeros([ROWS], tl.int32)
    if CLASSES > 1:
        nearest = tl.full([ROWS], float("inf"), tl.float32)
        for i in tl.static_range(CLASSES):
            of_class = tl.load(mean + i * width + column, mask=used, other=0.0)
            weighted = of_class * weight
            distance = tl.sum(of_class * weighted, 0)
            distance = distance - 2 * tl.sum(numbers * weighted[None, :], 1)
            nearer = distance < nearest
            nearest = tl.where(nearer, distance, nearest)
            kind = tl.where(nearer, i, kind)
            centred = tl.where(nearer[:, None], numbers - of_class[None, :], centred)

    relative = centred / tl.load(spread + column, mask=used, other=1.0)[None, :]
    limit = tl.load(reach + column, mask=used, other=0.0)[None, :]
    coded = tl.maximum(tl.sum((limit > 0).to(tl.float32), 1), 1.0)
    ratio = tl.sqrt(tl.sum(relative * relative, 1) / coded)
    around = STEPS * (tl.log2(tl.maximum(ratio, tl.exp2(octave))) - octave)
    size = tl.load(step + column, mask=used, other=1.0)
    weight = (weight * size * size)[None, :]
    in_steps = centred / size[None, :]
    best = tl.full([ROWS], float("inf"), tl.float32)
    index = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(TRIED):
        tried = round_to_even(tl.maximum(around + (FIRST_TRIED + i * TRIED_STEP), 0.0))
        tried = tl.minimum(tried, (1 << SCALE_BITS) - 1)
        scale = tl.exp2(tried / STEPS + octave)
        u = in_steps * (1 / scale)[:, None]
        error = u - (code_of(u, limit) - limit)
        error = tl.sum(error * error * weight, 1) * scale * scale
        better = error < best
        index = tl.where(better, tried, index)
        best = tl.where(better, error, best)

    scale = tl.exp2(index / STEPS + octave)
    u = in_steps * (1 / scale)[:, None]
    code = code_of(u, limit)
    place = of_row * width + column[None, :]
    head = (kind << SCALE_BITS) | index.to(tl.int32)
    if packed is not None:
        NUMBER_BYTES: tl.constexpr = scaled.dtype.element_ty.primitive_bitwidth // 8
        waiting = scaled.to(tl.pointer_type(tl.uint8)) + of_row * (scaled_stride * NUMBER_BYTES)
        tl.store(waiting + column[None, :], code.to(tl.uint8), mask=mask)
        tl.debug_barrier()  # codes are read back, by other threads
        byte = tl.arange(0, BYTES)
        of_bytes = (row < rows)[:, None] & (byte < bytes)[None, :]
        bits = places + AT_MOST * bytes + byte
        taken = tl.load(bits, mask=byte < bytes, other=1)[None, :]
        shift = tl.load(bits + bytes, mask=byte < bytes, other=0)[None, :]
        result = tl.zeros([ROWS, BYTES], tl.int32)
        for plane in tl.static_range(AT_MOST):
            at = tl.load(places + plane * bytes + byte, mask=byte < bytes, other=-1)[None, :]
            read = tl.load(waiting + at, mask=of_bytes & (at >= 0), other=0)
            field = (read.to(tl.int32) >> shift) & ((1 << taken) - 1)
            result |= field << tl.minimum(plane * taken, 8)
        result = tl.where((byte == header_at)[None, :], head[:, None], result)
        sequence = (row // together).to(tl.int64)[:, None] * packed_stride
        packed += tl.cast(packed_first, tl.int64) + sequence + of_row % together * bytes
        tl.store(packed + byte[None, :], result.to(tl.uint8), mask=of_bytes)
        tl.debug_barrier()  # all have read them
    if scaled is not None:
        numbers = scale[:, None] * size[None, :] * (code - limit)
        number = scaled.dtype.element_ty
        tl.store(scaled + of_row * scaled_stride + column[None, :], numbers.to(number), mask=mask)
        if label is not None:
            tl.store(label + row, kind.to(tl.int64), mask=row < rows)
        else:
            at = width + tl.arange(0, FEATURES)[None, :]
            behind = tl.where(at == width, kind[:, None], 0).to(number)
            there = (row < rows)[:, None] & (at < width // FEATURES * FEATURES + FEATURES)
            tl.store(scaled + of_row * scaled_stride + at, behind, mask=there)
    if inside is not None:
        tl.store(inside + place, tl.abs(u) <= limit + 0.5, mask=mask)
    if codes is not None:
        tl.store(codes + place, code.to(tl.uint8), mask=mask)
    if header is not None:
        tl.store(header + row, head.to(tl.uint8), mask=row < rows)
