"""Sums as `latent_sums.py` makes them, on Hopper's matrix unit.

A program is one group of four warps with a piece of the components for each, of keys or of
values. What it needs of rows comes block by block into a ring in shared memory, as it lies in the
cache, and so do weights. A thread reads the words that it needs of the slots that it needs, so
that what it takes apart is what the matrix unit takes from its registers:

    sums [n, C] += codes [n, T] · weights [T, C]

The order of slots and of places within a product is free; it is chosen so that eight neighbouring
slots, and in the end eight neighbouring places, are one thread's.

A word is taken apart once for the two items of a pair. Codes stay where they lie in their bytes, as
numbers of fp16 that are multiples of 2⁻²⁴; what they stand for, and what their centres give, comes
to the sums in the end. Weights are taken times a factor of their block, a power of two, which
changes nothing in fp16, on their way to where the matrix unit reads them.

Assemblers before CUDA 13.3 may reuse registers while the unit still reads them
(triton-lang/triton#11781). So that they cannot, all codes are used once more when it has
(`hold`).

This is written in Gluon, Triton's language of explicit layouts.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_names import reinterpret, synchronize
from .latent import AT_RUN_TIME
from .latent_sums import BLOCKS_AT_ONCE, TERMS
from .latent_sums_layouts import (
    all_items_layout,
    fours_layout,
    sums_layout,
    terms_layout,
    words_layout,
)
from .latent_sums_operands import SLOTS, codes_of, hold, in_place, scale_weights
from .shared_hopper import load_word, shared_begin, start_copy
from .split_kv import slot_bounds

GROUP = gl.constexpr(8)  # slots of a thread, side by side
GAP = gl.constexpr(32)  # bytes behind their rows, so that four threads read from other banks
ONE = gl.constexpr(2.0**24)  # the last bit of fp16 numbers is this part of one


@gluon.jit
def copy_block(
    index,
    last,
    target,
    rows,
    before,
    first_word,
    count,
    stride_t,
    length,
    maxima,
    stride,
    weights,
    padded_columns,
    first_block,
    splits,
    COLUMNS: gl.constexpr,
    BLOCK: gl.constexpr,
    CHUNKS: gl.constexpr,
):
    """Starts copies of what a block takes, if it is before the last: `count` words of each row from
    the first on, weights and maxima.

    `target` is the same address for all threads; `rows` is one in global memory, so many bytes
    `before` the first row.
    """
    THREADS: gl.constexpr = target.shape[0]
    WEIGHTS: gl.constexpr = 2 * BLOCK * COLUMNS
    thread = gl.arange(0, THREADS, target.type.layout)
    if index < last:
        block = first_block + index * splits
        left = gl.minimum(length - block * BLOCK, BLOCK) * (4 * stride_t) + before
        here = rows + block.to(gl.int64) * (4 * BLOCK * stride_t)
        for i in gl.static_range(0, BLOCK * CHUNKS, THREADS):
            slot, chunk = (thread + i) // CHUNKS, (thread + i) % CHUNKS
            at = (before + (slot * stride_t + first_word) * 4 & -16) + chunk * 16
            at = gl.where((slot < BLOCK) & (chunk < gl.cdiv(count + 3, 4)), at, 0x7FFFFFFF)
            to = target + (slot * (16 * CHUNKS) + slot // GROUP * GAP + chunk * 16)
            start_copy(to, here + at, at < left)
        target += BLOCK * (16 * CHUNKS) + BLOCK // GROUP * GAP + thread * 16
        here = weights + index.to(gl.int64) * splits * (padded_columns * BLOCK)
        here = here.to(gl.int64) + thread * 16
        for i in gl.static_range(0, WEIGHTS, 16 * THREADS):
            start_copy(target + i, here + i, thread * 16 < WEIGHTS - i)
        here = (maxima + index * stride).to(gl.int64) + thread * 16
        start_copy(target + WEIGHTS, here, thread < COLUMNS // 4)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=[*AT_RUN_TIME, "splits", "blocks"])
def latent_sums_on_hopper(
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
    COLUMNS: gl.constexpr,
    TILES: gl.constexpr,
    PLACES: gl.constexpr,  # of a program
    BLOCK: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    CHUNKS: gl.constexpr,  # of 16 bytes, that hold what a program needs of a row
):
    """`latent_sums_kernel` for weights in fp16 and a cache in one piece. The grid is [programs of
    keys and then of values, splits, b · tiles]."""
    gl.static_assert(pages is None and (BLOCK == 32 or BLOCK == 64))
    ITEMS: gl.constexpr = PLACES // 4
    PAIRS: gl.constexpr = PLACES // (8 * WARPS)  # of a warp
    WORDS: gl.constexpr = words_layout(WARPS, PAIRS)
    BY_THREAD: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    FOURS: gl.constexpr = fours_layout(COLUMNS, BLOCK // 8)
    OUT: gl.constexpr = sums_layout(WARPS, COLUMNS, PLACES)
    BY_BLOCK: gl.constexpr = terms_layout(WARPS, COLUMNS, BLOCKS_AT_ONCE)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    OF_COLUMN: gl.constexpr = gl.SliceLayout(1, FOURS)
    split = gl.program_id(1)
    batch, tile = gl.program_id(2) // TILES, gl.program_id(2) % TILES
    begin, stop = slot_bounds(start, end, length, positions, window, batch)
    # Every `splits`-th block, so that a short text in a long cache is shared evenly.
    first_block = begin // BLOCK + split
    own = gl.cdiv(gl.maximum(gl.cdiv(stop, BLOCK) - first_block, 0), splits)

    stride = TERMS * padded_columns
    terms = block_terms + (batch * blocks + first_block) * stride
    stride *= splits
    column = tile * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, BY_BLOCK))
    inside = column < columns
    in_turn = gl.arange(0, BLOCKS_AT_ONCE, gl.SliceLayout(1, BY_BLOCK))
    highest = gl.full([COLUMNS], float("-inf"), gl.float32, gl.SliceLayout(0, BY_BLOCK))
    first, last = gl.maximum(own, 1), 0  # blocks that nothing attends to hold no weights
    for i in range(0, own, BLOCKS_AT_ONCE):
        index = i + in_turn
        known = (index < own)[:, None] & inside[None, :]
        of_blocks = terms + (column[None, :] + index[:, None] * stride)
        of_blocks = gl.load(of_blocks, mask=known, other=float("-inf"))
        highest = gl.maximum(highest, gl.max(of_blocks, 0))
        used = gl.max(of_blocks, 1) > float("-inf")
        first = gl.minimum(first, gl.min(gl.where(used, index, own), 0))
        last = gl.maximum(last, gl.max(gl.where(used, index + 1, 0), 0))
    shift = gl.where(highest == float("-inf"), 0.0, highest)

    # A program is of keys or of values.
    program = gl.program_id(0)
    of_keys = gl.cdiv(key_items - first_item, ITEMS)
    first_item += program * ITEMS
    stride_t, rows = key_stride_t, keys + batch.to(gl.int64) * key_stride_b
    end_item = key_items
    of_part = 0
    if program >= of_keys:
        first_item = key_items + (program - of_keys) * ITEMS
        stride_t = value_stride_t
        rows = values + batch.to(gl.int64) * value_stride_b
        end_item = total
        of_part = padded_columns * (BLOCK // 2)
    # Copies begin at multiples of 16 bytes, as all rows of blocks do or none.
    rows = rows.to(gl.int64)
    before = (rows & 15).to(gl.int32)
    rows -= before
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(1, WORDS)))[:, None]
    at = first_item + warp * (2 * PAIRS)
    at = at + gl.arange(0, PAIRS, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, :] * 2
    at = gl.minimum(at, end_item - 2)  # what warps behind the last item find is not stored
    one, other = gl.load(items + at), gl.load(items + at + 1)
    word = gl.expand_dims(one & 0xFFFF, 1)
    one, other = in_place(one), in_place(other)
    in_step = gl.arange(0, SLOTS, gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))
    in_step = gl.expand_dims(gl.expand_dims(in_step, 0), 2)
    weights += (batch * blocks + first_block).to(gl.int64) * (2 * padded_columns * BLOCK)
    weights += tile * (COLUMNS * BLOCK)
    weights = weights.to(gl.pointer_type(gl.int32)) + of_part
    sums = gl.full([PLACES, COLUMNS], 0.0, gl.float32, SUMS)
    weighed = gl.full([COLUMNS], 0.0, gl.float32, OF_COLUMN)

    # Only words between the program's first and last are brought to shared memory.
    every = first_item + gl.arange(0, ITEMS, all_items_layout(WARPS, ITEMS))
    every = gl.minimum(every, end_item - 1)
    every_word = gl.load(items + every) & 0xFFFF
    first_word = gl.min(every_word, 0)
    count = gl.max(every_word, 0) - first_word + 1
    PITCH: gl.constexpr = 16 * CHUNKS
    ROWS: gl.constexpr = BLOCK * PITCH + BLOCK // GROUP * GAP
    BYTES: gl.constexpr = ROWS + COLUMNS * (2 * BLOCK + 4)  # of a stage
    STEPS: gl.constexpr = BLOCK // 16  # of products in a block
    STEP: gl.constexpr = 32 * COLUMNS  # bytes of scaled weights of one
    BEGIN: gl.constexpr = 2 * STEPS * STEP
    W = gl.allocate_shared_memory(
        gl.float16,
        [2 * STEPS + (STAGES * BYTES + STEP - 1) // STEP, COLUMNS, 16],
        gl.NVMMASharedLayout.get_default_for([COLUMNS, 16], gl.float16),
    )
    IN_LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    passed = reinterpret(W.index(0), gl.float32, [8 * COLUMNS], IN_LINE).slice(0, COLUMNS)
    passed.store(shift)
    synchronize()
    of_sums = passed.load(OF_COLUMN)
    target = shared_begin(gl.full([32 * WARPS], 0, gl.int32, BY_THREAD)) + BEGIN
    of_words = shared_begin(gl.full([WARPS, SLOTS, PAIRS], 0, gl.int32, WORDS)) + BEGIN
    word = gl.minimum(word - first_word, 4 * CHUNKS - 4)  # within the ring, whatever is in tables
    of_words += in_step // GROUP * (GROUP * PITCH + GAP) + word * 4
    in_group = in_step % GROUP
    of_row = in_group * PITCH + (before + (in_group * stride_t + first_word) * 4 & 15)
    row = gl.arange(0, COLUMNS, gl.SliceLayout(1, FOURS))
    four = gl.arange(0, BLOCK // 8, gl.SliceLayout(0, FOURS))
    of_fours = shared_begin(gl.full([COLUMNS, BLOCK // 8], 0, gl.int32, FOURS)) + (BEGIN + ROWS)
    of_fours += row[:, None] * (2 * BLOCK) + four[None, :] * 16
    of_terms = shared_begin(gl.full([COLUMNS], 0, gl.int32, OF_COLUMN))
    of_terms += BEGIN + ROWS + COLUMNS * (2 * BLOCK) + row * 4
    maxima = terms + tile * COLUMNS
    of_program = (
        rows,
        before,
        first_word,
        count,
        stride_t,
        length,
        maxima,
        stride,
        weights,
        padded_columns,
        first_block,
        splits,
    )
    for ahead in gl.static_range(STAGES - 1):
        copy_block(first + ahead, last, target + ahead * BYTES, *of_program, COLUMNS, BLOCK, CHUNKS)
    # While the first blocks come.
    of_split = batch * splits + split
    out = partial_terms + of_split * (TERMS * columns) + column
    if program == 0:
        gl.store(out, shift, mask=inside)
    for term in range(1 + program, TERMS, gl.num_programs(0)):
        summed = gl.full([COLUMNS], 0.0, gl.float32, gl.SliceLayout(0, BY_BLOCK))
        for i in range(0, own, BLOCKS_AT_ONCE):
            index = i + in_turn
            known = (index < own)[:, None] & inside[None, :]
            of_blocks = terms + (column[None, :] + index[:, None] * stride)
            factor = gl.load(of_blocks, mask=known, other=float("-inf"))
            of_blocks = gl.load(of_blocks + term * padded_columns, mask=known, other=0.0)
            summed += gl.sum(of_blocks * gl.exp2(factor - shift[None, :]), 0)
        gl.store(out + term * columns, summed, mask=inside)

    # Weights are scaled a block ahead.
    factor = of_sums, of_terms, of_fours
    async_copy.wait_group(STAGES - 2)
    synchronize()
    if first < last:
        weighed += scale_weights(W, 0, *factor, 0)
    fence_async_shared()
    stage, free = first * 0, first * 0 + (STAGES - 1)
    never = gl.minimum(length, 0)
    for index in range(first, last):
        async_copy.wait_group(STAGES - 3)
        synchronize()  # all have read what the next copy takes the place of
        copy_block(
            index + STAGES - 1, last, target + free * BYTES, *of_program, COLUMNS, BLOCK, CHUNKS
        )
        free, begins = stage, stage * BYTES
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        step = (index - first) % 2 * STEPS
        held = None
        for share in gl.static_range(BLOCK // SLOTS):
            words = load_word(
                of_words + (begins + share * (SLOTS // GROUP * (GROUP * PITCH + GAP))) + of_row
            )
            codes, more = codes_of(words, one, other, SUMS)
            right = W.index(step + 2 * share).permute((1, 0))
            sums = warpgroup_mma(codes, right, sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(sums,))
            if held is not None:
                hold(held, never)
            right = W.index(step + 2 * share + 1).permute((1, 0))
            sums = warpgroup_mma(more, right, sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=(sums,))
            hold(codes, never)
            held = more
        if index + 1 < last:
            weighed += scale_weights(W, STEPS - step, *factor, stage * BYTES)
        fence_async_shared()
        sums = warpgroup_mma_wait(0, deps=(sums,))
        hold(held, never)

    sums = gl.reshape(sums, [PAIRS // 8, 2, 2, WARPS, 2, 8, COLUMNS])
    sums = gl.reshape(gl.permute(sums, [3, 0, 5, 1, 2, 4, 6]), [PLACES, COLUMNS])
    sums = gl.convert_layout(sums, OUT)  # registers of a thread in the order of places
    synchronize()
    passed.store(weighed)
    synchronize()
    weighed = passed.load(gl.SliceLayout(0, OUT))
    place = first_item * 4 + gl.arange(0, PLACES, gl.SliceLayout(1, OUT))
    item = gl.load(items + place // 4, mask=place < 4 * end_item, other=0)
    mask, keep = in_place(item) & 0xFF, item >> 24
    one_is = (keep & -keep).to(gl.float32) / gl.maximum(mask & -mask, 1).to(gl.float32)
    one_is *= ONE / 8
    centre = keep.to(gl.float32) / 16
    sums = sums * one_is[:, None] - centre[:, None] * weighed[None, :]
    column = tile * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, OUT))
    row = (of_split * columns + column).to(gl.int64) * (4 * total)
    inside = (column < columns)[None, :] & (place < 4 * end_item)[:, None]
    gl.store(partial + (row[None, :] + place[:, None]), sums, mask=inside)
