"""Sums as `latent_sums.py` makes them, by warps that share nothing.

Every warp has a piece of the components for itself. A thread loads the words that it needs of the
slots that it needs, so that what it takes apart is what the matrix unit wants of it on the right:

    sums [C, n] += weights [C, T] · codes [T, n]

Nothing goes through shared memory and no warp waits for another. The order of slots and of places
within a product is free; it is chosen so that eight neighbouring slots, and in the end eight
neighbouring places, are one thread's.

Codes stand in the last bits of fp16 numbers, as multiples of 2⁻²¹; what their centres give is taken
off the sums. Factors between blocks are powers of two, which change nothing in fp16.

This is written in Gluon, Triton's language of explicit layouts.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .latent import AT_RUN_TIME
from .latent_sums import BLOCKS_AT_ONCE, TERMS
from .split_kv import slot_bounds

SLOTS = gl.constexpr(32)  # at a time
ONE = gl.constexpr(2.0**21)  # codes of one are this part of it


@gluon.constexpr_function
def highest_bits(*axes):
    """Bases of a layout: of each (axis, rank, first, stop) those powers of two."""
    found = []
    for axis, rank, first, stop in axes:
        while first < stop:
            found.append([first if i == axis else 0 for i in range(rank)])
            first *= 2
    return found


@gluon.constexpr_function
def words_layout(warps, items):
    """Of words [warps, slots, items]: eight slots side by side are one thread's."""
    return gl.DistributedLinearLayout(
        reg_bases=highest_bits((1, 3, 1, 8), (2, 3, 8, items)),
        lane_bases=highest_bits((1, 3, 8, 32), (2, 3, 1, 8)),
        warp_bases=highest_bits((0, 3, 1, warps)),
        block_bases=[],
        shape=[warps, 32, items],
    )


@gluon.constexpr_function
def weights_layout(warps, columns):
    """Of weights [warps, columns, slots]: the same."""
    return gl.DistributedLinearLayout(
        reg_bases=highest_bits((2, 3, 1, 8), (1, 3, 8, columns)),
        lane_bases=highest_bits((2, 3, 8, 32), (1, 3, 1, 8)),
        warp_bases=highest_bits((0, 3, 1, warps)),
        block_bases=[],
        shape=[warps, columns, 32],
    )


@gluon.constexpr_function
def terms_layout(warps, columns, blocks):
    """Of terms [blocks, columns]: every warp has all, columns as in `weights_layout`."""
    return gl.DistributedLinearLayout(
        reg_bases=highest_bits((0, 2, 4, blocks), (1, 2, 8, columns)),
        lane_bases=highest_bits((0, 2, 1, 4), (1, 2, 1, 8)),
        warp_bases=[[0, 0]] * (warps.bit_length() - 1),
        block_bases=[],
        shape=[blocks, columns],
    )


@gluon.jit
def codes_of(words, item, SUMS: gl.constexpr):
    """Codes [warps, slots, places] of words [warps, slots, items], for a product.

    What a word's four bytes hold of two slots comes out as four pairs. Places of eight items stand
    byte by byte: those of the first bytes, of the third, the second and the fourth.
    """
    W: gl.constexpr = words.shape[0]
    I: gl.constexpr = words.shape[2]  # noqa: E741
    words = gl.permute(gl.reshape(words, [W, SLOTS // 2, 2, I]), [0, 1, 3, 2])
    even, odd = gl.split(words)
    item = gl.convert_layout(item, gl.SliceLayout(1, even.type.layout), assert_trivial=True)
    item = gl.expand_dims(item, 1)
    turn = (item >> 16) & 31
    keep = (item >> 24) * 0x01010101
    a0, a1, b0, b1, c0, c1, d0, d1 = gl.inline_asm_elementwise(
        """{
        .reg .b32 even, odd, pair;
        shf.r.wrap.b32 even, $8, $8, $10;
        shf.r.wrap.b32 odd, $9, $9, $10;
        and.b32 even, even, $11;
        and.b32 odd, odd, $11;
        prmt.b32 pair, even, odd, 0xC480;
        mov.b32 {$0, $1}, pair;
        prmt.b32 pair, even, odd, 0xE6A2;
        mov.b32 {$2, $3}, pair;
        prmt.b32 pair, even, odd, 0xD591;
        mov.b32 {$4, $5}, pair;
        prmt.b32 pair, even, odd, 0xF7B3;
        mov.b32 {$6, $7}, pair;
        }""",
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
        [even, odd, turn, keep],
        dtype=(gl.int16,) * 8,
        is_pure=True,
        pack=1,
    )
    low = gl.join(gl.join(a0, a1), gl.join(b0, b1))
    high = gl.join(gl.join(c0, c1), gl.join(d0, d1))
    codes = gl.join(low, high)  # [W, slots / 2, items, 2 slots, 2 · 2 places]
    codes = gl.reshape(codes, [W, 4, 2, 2, I // 8, 8, 2, 2, 2])
    codes = gl.permute(codes, [0, 2, 3, 1, 6, 4, 8, 7, 5])
    codes = gl.reshape(codes, [W, SLOTS, 4 * I]).to(gl.float16, bitcast=True)
    return gl.convert_layout(codes, gl.DotOperandLayout(1, SUMS, 2), assert_trivial=True)


@gluon.jit
def scaled(weights, factor, SUMS: gl.constexpr):
    """Weights [warps, columns, slots] times a factor of each column, for a product."""
    W: gl.constexpr = weights.shape[0]
    C: gl.constexpr = weights.shape[1]
    factor = gl.expand_dims(gl.expand_dims(factor, 0), 2)
    found = gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;",
        "=r,r,r",
        [weights, factor],
        dtype=gl.float16,
        is_pure=True,
        pack=2,
    )
    found = gl.permute(gl.reshape(found, [W, C, 4, 2, 2, 2]), [0, 1, 3, 4, 2, 5])
    found = gl.reshape(found, [W, C, SLOTS])
    return gl.convert_layout(found, gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)


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
    first_piece,
    padded_columns,
    window,
    COLUMNS: gl.constexpr,
    TILES: gl.constexpr,
    PIECE: gl.constexpr,  # places that `first_piece` counts
    PLACES: gl.constexpr,  # of a warp
    BLOCK: gl.constexpr,
    WARPS: gl.constexpr,
):
    """`latent_sums_kernel` for weights in fp16 and a cache in one piece, with a piece for every
    warp. The grid is [programs that share the pieces, splits, b · tiles]."""
    gl.static_assert(pages is None)
    ITEMS: gl.constexpr = PLACES // 4
    WORDS: gl.constexpr = words_layout(WARPS, ITEMS)
    WEIGHTS: gl.constexpr = weights_layout(WARPS, COLUMNS)
    BY_BLOCK: gl.constexpr = terms_layout(WARPS, COLUMNS, BLOCKS_AT_ONCE)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, WEIGHTS))
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

    of_split = batch * splits + split
    if gl.program_id(0) == 0:
        out = partial_terms + of_split * (TERMS * columns) + column
        gl.store(out, shift, mask=inside)
        for term in gl.static_range(1, TERMS):
            summed = gl.full([COLUMNS], 0.0, gl.float32, gl.SliceLayout(0, BY_BLOCK))
            for i in range(0, own, BLOCKS_AT_ONCE):
                index = i + in_turn
                known = (index < own)[:, None] & inside[None, :]
                of_blocks = terms + (column[None, :] + index[:, None] * stride)
                factor = gl.load(of_blocks, mask=known, other=float("-inf"))
                of_blocks = gl.load(of_blocks + term * padded_columns, mask=known, other=0.0)
                summed += gl.sum(of_blocks * gl.exp2(factor - shift[None, :]), 0)
            gl.store(out + term * columns, summed, mask=inside)

    # Whether a warp's piece is of keys or of values decides which rows it reads, which weights.
    first_item = first_piece * (PIECE // 4) + gl.program_id(0) * (WARPS * ITEMS)
    OF_WARP: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, WORDS))
    of_values = first_item + gl.arange(0, WARPS, OF_WARP) * ITEMS >= key_items
    stride_t = gl.where(of_values, value_stride_t, key_stride_t)
    rows = gl.where(
        of_values,
        values + batch.to(gl.int64) * value_stride_b,
        keys + batch.to(gl.int64) * key_stride_b,
    )
    rows = gl.expand_dims(gl.expand_dims(rows, 1), 2)
    stride_t = gl.expand_dims(gl.expand_dims(stride_t, 1), 2)
    in_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(1, WORDS)))[:, None] * ITEMS
    at = first_item + in_warp
    at = at + gl.arange(0, ITEMS, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, :]
    item = gl.load(items + at, mask=at < total, other=0)
    word = gl.expand_dims(item & 0xFFFF, 1)
    in_step = gl.arange(0, SLOTS, gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))
    in_step = gl.expand_dims(gl.expand_dims(in_step, 0), 2)

    weights += (batch * blocks + first_block).to(gl.int64) * (2 * padded_columns * BLOCK)
    weights += tile * (COLUMNS * BLOCK)
    OF_WARP_TOO: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, WEIGHTS))
    part = first_item + gl.arange(0, WARPS, OF_WARP_TOO) * ITEMS >= key_items
    part = gl.where(part, padded_columns * BLOCK, 0)
    of_weight = gl.arange(0, COLUMNS, OF_COLUMN) * BLOCK
    of_weight = gl.expand_dims(gl.expand_dims(part, 1), 2) + of_weight[None, :, None]
    in_block = gl.arange(0, SLOTS, gl.SliceLayout(0, gl.SliceLayout(1, WEIGHTS)))
    of_weight = of_weight + in_block[None, None, :]
    column = tile * COLUMNS + gl.arange(0, COLUMNS, OF_COLUMN)
    of_sums = gl.convert_layout(shift, OF_COLUMN, assert_trivial=True)
    SHARES: gl.constexpr = BLOCK // SLOTS  # of a block
    begins, ends = first * SHARES, last * SHARES
    sums = gl.full([WARPS, COLUMNS, PLACES], 0.0, gl.float32, SUMS)
    weighed = gl.full([WARPS, COLUMNS, 8], 0.0, gl.float32, SUMS)
    ones = gl.full([WARPS, SLOTS, 8], 1.0, gl.float16, gl.DotOperandLayout(1, SUMS, 2))
    # What the next step adds up is loaded before this one's product; the first step loads only.
    words = gl.full([WARPS, SLOTS, ITEMS], 0, gl.int32, WORDS)
    weight = gl.full([WARPS, COLUMNS, SLOTS], 0.0, gl.float16, WEIGHTS)
    of_block = gl.full([COLUMNS], float("-inf"), gl.float32, OF_COLUMN)
    for step in range(begins - 1, ends):
        left = scaled(weight, gl.exp2(of_block - of_sums).to(gl.float16), SUMS)
        right = codes_of(words, item, SUMS)

        following = gl.minimum(step + 1, ends - 1)
        index, share = following // SHARES, following % SHARES
        slot = ((first_block + index * splits) * SHARES + share) * SLOTS
        # Reading slots that nothing attends to is cheaper than asking which they are.
        row = gl.minimum(in_step, length - 1 - slot) * stride_t
        words = gl.load(rows + slot.to(gl.int64) * stride_t + (row + word))
        of_block = gl.load(terms + index * stride + column)
        of_slots = weights + index.to(gl.int64) * splits * (2 * padded_columns * BLOCK)
        weight = gl.load(of_slots + share * SLOTS + of_weight)
        sums = mma_v2(left, right, sums)
        weighed = mma_v2(left, ones, weighed)

    sums = gl.reshape(sums, [WARPS, COLUMNS, ITEMS // 8, 4, 8])
    sums = gl.reshape(gl.permute(sums, [0, 1, 2, 4, 3]), [WARPS, COLUMNS, PLACES])
    OUT: gl.constexpr = sums.type.layout
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(1, OUT)))[:, None]
    place = first_item * 4 + warp * PLACES
    place = place + gl.arange(0, PLACES, gl.SliceLayout(0, gl.SliceLayout(1, OUT)))[None, :]
    centre = gl.load(items + place // 4, mask=place < 4 * total, other=0) >> 24
    centre = gl.expand_dims(centre.to(gl.float32) / 16, 1)
    weighed = gl.convert_layout(gl.max(weighed, 2), gl.SliceLayout(2, OUT), assert_trivial=True)
    sums = sums * ONE - centre * gl.expand_dims(weighed, 2)
    column = tile * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(2, OUT)))
    row = (of_split * columns + column).to(gl.int64) * (4 * total)
    inside = (column < columns)[None, :, None] & gl.expand_dims(place < 4 * total, 1)
    gl.store(partial + (row[None, :, None] + gl.expand_dims(place, 1)), sums, mask=inside)
