"""What the last group of warps of `latent_hopper.py` does: it makes weights of scores."""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .latent import NEVER, load_header
from .latent_hopper_scores import IN_LINE, SCORES, attended_to, columns_of, synchronize
from .split_kv import LOG2_E, tanh

OF_WEIGHTS = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))


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
    HEADS: gl.constexpr,
    MULTIPLE: gl.constexpr,
):
    """Weights of both blocks of each tile, and their terms; see `latent_weights_kernel`."""
    S, given, taken = passed
    keys, values = inputs
    weights_out, block_terms = outputs
    mask, begin, stop, window = bounds
    key_stride_t, value_stride_t = strides
    heads, positions, length, padded_columns, header_k, header_v = numbers
    scale, softcap, octave_k, octave_v = factors
    T: gl.constexpr = S.shape[1]
    ALL: gl.constexpr = S.shape[2]
    SLOTS: gl.constexpr = gl.SliceLayout(1, SCORES)
    WEIGHT: gl.constexpr = weights_out.dtype.element_ty
    blocks = gl.cdiv(length, T)
    columns = HEADS // 2 * (heads // GROUPS) * positions, heads * positions
    column, used = columns_of(gl.SliceLayout(0, SCORES), ALL, *columns)
    # Where slots of a column lie side by side.
    of_column, written = columns_of(gl.SliceLayout(0, OF_WEIGHTS), ALL, *columns)
    of_slot = gl.arange(0, T, gl.SliceLayout(1, OF_WEIGHTS))[:, None]
    of_slot = (of_column * T)[None, :] + of_slot
    tiles = 0
    for tile in range(gl.program_id(0), gl.cdiv(length, 2 * T), gl.num_programs(0)):
        attended = attended_to(tile, begin, stop, mask, T)
        for half in range(2):
            block = tile * 2 + half
            inside_block = block < blocks
            of_block = gl.program_id(1) * blocks + block
            terms = block_terms + of_block * (4 * padded_columns)
            of_weights = weights_out + of_block.to(gl.int64) * (2 * padded_columns * T)
            if attended:
                base = gl.minimum(block * T, length - 1)
                last = length - 1 - base
                row = gl.minimum(gl.arange(0, T, SLOTS), last)
                rows = keys + base.to(gl.int64) * key_stride_t
                key_scale, key_class = load_header(rows, row * key_stride_t, octave_k, header_k)
                rows = values + base.to(gl.int64) * value_stride_t
                row *= value_stride_t
                value_scale, value_class = load_header(rows, row, octave_v, header_v)
                any_class = gl.max(gl.maximum(key_class, value_class), 0)  # hardly ever
                mbarrier.wait(given.index(half), tiles % 2)
                scores = S.index(half).load(SCORES) * key_scale[:, None]
                synchronize()
                mbarrier.arrive(taken.index(half), count=1)

                slot = block * T + gl.arange(0, T, SLOTS)
                valid = (slot >= begin) & (slot < stop)
                if softcap is not None:
                    scores = softcap * tanh(scores * (scale / softcap)) * LOG2_E
                else:
                    scores = scores * (scale * LOG2_E)
                if mask is not None:
                    if mask.dtype.element_ty.is_floating():
                        bias = gl.load(mask + slot, mask=valid, other=0).to(gl.float32)
                        valid = valid & (bias > NEVER)
                        scores += gl.where(valid, bias * LOG2_E, 0.0)[:, None]
                    else:
                        valid = valid & (gl.load(mask + slot, mask=valid, other=0) != 0)
                seen = valid[:, None] & used[None, :]
                if MULTIPLE:  # several query positions, each with its own last slot
                    own = (stop - positions + column % positions)[None, :]
                    seen = seen & (slot[:, None] <= own)
                    if window is not None:
                        seen = seen & (slot[:, None] > own - window)
                scores = gl.where(seen, scores, float("-inf"))
                highest = gl.ceil(gl.max(scores, 0))
                shift = gl.where(highest == float("-inf"), 0.0, highest)
                weights = gl.exp2(scores - shift[None, :])
                of_keys = gl.full([ALL], 0.0, gl.float32, gl.SliceLayout(0, SCORES))
                of_values = of_keys
                if any_class > 0:
                    of_keys = gl.sum(weights * key_class[:, None], 0)
                    of_values = gl.sum(weights * value_class[:, None], 0)
                inside = used & inside_block
                gl.store(terms + column, highest, mask=inside)
                gl.store(terms + padded_columns + column, gl.sum(weights, 0), mask=inside)
                gl.store(terms + 2 * padded_columns + column, of_values, mask=inside)
                gl.store(terms + 3 * padded_columns + column, of_keys, mask=inside)
                inside = (written & inside_block)[None, :] & (of_slot >= 0)
                scaled = gl.convert_layout((weights * key_scale[:, None]).to(WEIGHT), OF_WEIGHTS)
                gl.store(of_weights + of_slot, scaled, mask=inside)
                scaled = gl.convert_layout((weights * value_scale[:, None]).to(WEIGHT), OF_WEIGHTS)
                gl.store(of_weights + padded_columns * T + of_slot, scaled, mask=inside)
            else:
                write_nothing(terms, of_weights, padded_columns, inside_block, T)
        tiles += attended.to(gl.int32)


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
