"""What the last group of warps of `latent_hopper.py` does: it makes weights of scores."""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from .gluon_names import synchronize
from .latent import NEVER, read_header
from .latent_hopper_offsets import copy_tables, scores_of_offsets
from .latent_hopper_scores import IN_LINE, attended_to, columns_of, whole_rows
from .split_kv import LOG2_E, tanh

# Of scores and weights [T, columns]: a warp has all slots of its columns, a thread neighbours.
OF_WEIGHTS = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
OF_SLOTS = gl.constexpr(gl.SliceLayout(1, OF_WEIGHTS))
OF_COLUMNS = gl.constexpr(gl.SliceLayout(0, OF_WEIGHTS))


@gluon.jit
def finish(
    passed,
    inputs,
    outputs,
    bounds,
    strides,
    numbers,
    factors,
    GROUPS: gl.constexpr,
    PAIRS: gl.constexpr,  # of a head
    HEADS: gl.constexpr,
    MULTIPLE: gl.constexpr,
):
    """Weights of both blocks of each tile, and their terms; see `latent_weights_kernel`."""
    S, given, taken = passed
    O, C, keys, values, cosine, sine = inputs  # noqa: E741
    weights_out, block_terms = outputs
    mask, begin, stop, window = bounds
    key_stride_t, value_stride_t, table_stride_t = strides
    heads, positions, length, padded_columns, header_k, header_v = numbers
    scale, softcap, octave_k, octave_v = factors
    T: gl.constexpr = S.shape[1]
    ALL: gl.constexpr = S.shape[2]
    WEIGHT: gl.constexpr = weights_out.dtype.element_ty
    blocks = gl.cdiv(length, T)
    per_half = HEADS // 2 * (heads // GROUPS) * positions
    column, used = columns_of(OF_COLUMNS, ALL, per_half, heads * positions)
    in_block = gl.arange(0, T, IN_LINE)
    # Words of headers are loaded a block ahead, and so are cosines and sines.
    block = gl.program_id(0) * 2
    tables = cosine, sine
    copy_tables(C, *tables, block, length, table_stride_t, PAIRS)
    of_key = load_row_words(keys, block, length, key_stride_t, header_k // 4, T)
    of_value = load_row_words(values, block, length, value_stride_t, header_v // 4, T)
    tiles = 0
    for tile in range(gl.program_id(0), gl.cdiv(length, 2 * T), gl.num_programs(0)):
        attended = attended_to(tile, begin, stop, mask, T)
        for half in range(2):
            block = tile * 2 + half
            inside = used & (block < blocks)
            of_block = gl.program_id(1) * blocks + block
            terms = block_terms + of_block * (4 * padded_columns)
            of_weights = weights_out + of_block.to(gl.int64) * (2 * padded_columns * T)
            key_scale, key_class = read_header(of_key, octave_k, header_k)
            value_scale, value_class = read_header(of_value, octave_v, header_v)
            following = block + 1
            if half > 0:
                following = (tile + gl.num_programs(0)) * 2
            of_key = load_row_words(keys, following, length, key_stride_t, header_k // 4, T)
            of_value = load_row_words(values, following, length, value_stride_t, header_v // 4, T)
            async_copy.wait_group(0)  # of cosines and sines
            synchronize()
            if attended:
                any_class = gl.max(gl.maximum(key_class, value_class), 0)  # hardly ever
                of_offsets = scores_of_offsets(O, C, key_class, any_class)
                synchronize()
                copy_tables(C, *tables, following, length, table_stride_t, PAIRS)
                of_offsets = gl.convert_layout(gl.permute(of_offsets, (1, 0)), OF_WEIGHTS)
                slot = block * T + in_block
                valid = (slot >= begin) & (slot < stop)
                bias = gl.full([T], 0.0, gl.float32, IN_LINE)
                if mask is not None:
                    if mask.dtype.element_ty.is_floating():
                        bias = gl.load(mask + slot, mask=valid, other=0).to(gl.float32)
                        valid = valid & (bias > NEVER)
                        bias *= LOG2_E
                    else:
                        valid = valid & (gl.load(mask + slot, mask=valid, other=0) != 0)
                bias = gl.convert_layout(gl.where(valid, bias, float("-inf")), OF_SLOTS)
                of_keys = gl.convert_layout(key_scale, OF_SLOTS)[:, None]
                of_values = gl.convert_layout(value_scale, OF_SLOTS)[:, None]

                mbarrier.wait(given.index(half), tiles % 2)
                scores = S.index(half).load(OF_WEIGHTS)
                synchronize()
                mbarrier.arrive(taken.index(half), count=1)

                scores = scores * of_keys + of_offsets
                if softcap is not None:
                    scores = softcap * tanh(scores * (scale / softcap)) * LOG2_E
                else:
                    scores = scores * (scale * LOG2_E)
                # Whatever stands in slots that nothing attends to, it may be no number.
                known = (bias > float("-inf"))[:, None]
                scores = gl.where(known, scores + bias[:, None], float("-inf"))
                if MULTIPLE:  # several query positions, each with its own last slot
                    slots = (block * T + gl.arange(0, T, OF_SLOTS))[:, None]
                    own = (stop - positions + column % positions)[None, :]
                    seen = slots <= own
                    if window is not None:
                        seen = seen & (slots > own - window)
                    scores = gl.where(seen, scores, float("-inf"))
                highest = gl.ceil(gl.max(scores, 0))
                shift = gl.where(highest == float("-inf"), 0.0, highest)
                weights = gl.exp2(scores - shift[None, :])
                gl.store(terms + column, highest, mask=inside)
                gl.store(terms + padded_columns + column, gl.sum(weights, 0), mask=inside)
                of_value_class = gl.full([ALL], 0.0, gl.float32, OF_COLUMNS)
                of_key_class = of_value_class
                if any_class > 0:
                    label = gl.convert_layout(value_class, OF_SLOTS)
                    of_value_class = gl.sum(weights * label[:, None], 0)
                    label = gl.convert_layout(key_class, OF_SLOTS)
                    of_key_class = gl.sum(weights * label[:, None], 0)
                gl.store(terms + 2 * padded_columns + column, of_value_class, mask=inside)
                gl.store(terms + 3 * padded_columns + column, of_key_class, mask=inside)
                at = (column * T)[None, :] + gl.arange(0, T, OF_SLOTS)[:, None]
                at = whole_rows(of_weights, at)
                every, at = gl.broadcast(inside[None, :], at)
                gl.store(at, (weights * of_keys).to(WEIGHT), mask=every)
                at = whole_rows(at, padded_columns * T)
                gl.store(at, (weights * of_values).to(WEIGHT), mask=every)
            else:
                copy_tables(C, *tables, following, length, table_stride_t, PAIRS)
                write_nothing(terms, of_weights, padded_columns, block < blocks, T)
        tiles += attended.to(gl.int32)


@gluon.jit
def load_row_words(rows, block, length, stride_t, word, T: gl.constexpr):
    """One word of each row [T] of a block of slots, of the last row for those behind it."""
    slot = gl.minimum(block * T + gl.arange(0, T, IN_LINE), length - 1)
    return gl.load(rows + (slot.to(gl.int64) * stride_t + word))


@gluon.jit
def write_nothing(terms, of_weights, padded_columns, inside_block, T: gl.constexpr):
    """Weights and terms of a block that nothing attends to."""
    for i in range(0, padded_columns, 32):
        column = i + gl.arange(0, 32, IN_LINE)
        inside = (column < padded_columns) & inside_block
        gl.store(terms + column, gl.full([32], float("-inf"), gl.float32, IN_LINE), mask=inside)
        nothing = gl.full([32], 0.0, gl.float32, IN_LINE)
        for term in gl.static_range(1, 4):
            gl.store(terms + term * padded_columns + column, nothing, mask=inside)
    for i in range(0, 2 * padded_columns * T, 1024):
        at = i + gl.arange(0, 1024, IN_LINE)
        nothing = gl.full([1024], 0.0, of_weights.dtype.element_ty, IN_LINE)
        gl.store(of_weights + at, nothing, mask=(at < 2 * padded_columns * T) & inside_block)
