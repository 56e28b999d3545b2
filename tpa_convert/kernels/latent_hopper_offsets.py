"""What offsets of keys give to scores in `latent_hopper.py`: only cosines and sines differ from
slot to slot, so that queries and offsets are multiplied before.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .gluon_names import copy_to_shared
from .latent_hopper_scores import (
    PAIRS_OF_SPAN,
    QUERIES,
    SPANS,
    columns_of,
    copied,
    whole_rows,
)

# Of scores [columns, T], which warps share by slots.
TRANSPOSED = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8]))
OF_OFFSETS = gl.constexpr(2.0**-6)  # times what offsets give: fp16 holds that of large ones too


@gluon.jit
def load_offsets(
    O,  # noqa: E741
    query,
    offset,
    stride_h,
    stride_s,
    heads,
    positions,
    GROUPS: gl.constexpr,
    BLOCKS: gl.constexpr,
    PAIRS: gl.constexpr,
    PADDED: gl.constexpr,
    HEADS: gl.constexpr,
):
    """What cosines, and sines, of slots are taken times to give what offsets of keys add to scores,
    [2, columns, pairs of a head], and the same of what the second class adds."""
    LOW: gl.constexpr = 8 if PADDED > 8 else PADDED
    shared = heads // GROUPS
    per_half = HEADS // 2 * shared * positions
    OF_COLUMN: gl.constexpr = gl.SliceLayout(1, QUERIES)
    column, inside = columns_of(OF_COLUMN, O.shape[1], per_half, heads * positions)
    pair = gl.arange(0, O.shape[2], gl.SliceLayout(0, QUERIES))
    head = column // positions
    inside = inside[:, None] & (pair < BLOCKS * PAIRS)[None, :]
    at = query + (head * stride_h + column % positions * stride_s)[:, None] + pair[None, :]
    real = gl.load(at, mask=inside, other=0.0).to(gl.float32)
    imaginary = gl.load(at + BLOCKS * PAIRS, mask=inside, other=0.0).to(gl.float32)
    group = head // shared
    of_head = group // HEADS * (2 * PAIRS_OF_SPAN) + group % HEADS * LOW
    in_block = pair % PAIRS
    of_pair = pair // PAIRS * (SPANS * 2 * PAIRS_OF_SPAN)
    of_pair += in_block // LOW * (HEADS * LOW) + in_block % LOW
    at = offset + of_head[:, None] + of_pair[None, :]
    for label in gl.static_range(2):
        a = gl.load(at, mask=inside, other=0.0)
        b = gl.load(at + PAIRS_OF_SPAN, mask=inside, other=0.0)
        O.index(2 * label).store(((real * a + imaginary * b) * OF_OFFSETS).to(O.dtype))
        O.index(2 * label + 1).store(((imaginary * a - real * b) * OF_OFFSETS).to(O.dtype))
        at += BLOCKS * (SPANS * 2 * PAIRS_OF_SPAN)


@gluon.jit
def copy_tables(
    C,
    cosine,
    sine,
    block,
    length,
    stride_t,
    PAIRS: gl.constexpr,  # of a head
):
    """Has cosines and sines of a block of slots brought to shared memory, [2, T, pairs]. Behind
    those of a head stand others, of which nothing comes."""
    T: gl.constexpr = C.shape[1]
    WIDTH: gl.constexpr = C.shape[2]
    COPIED: gl.constexpr = copied(C.dtype, WIDTH // 8)
    LAST: gl.constexpr = (PAIRS - 1) // 8
    slot = gl.minimum(block * T + gl.arange(0, T, gl.SliceLayout(1, COPIED)), length - 1)
    pair = gl.arange(0, WIDTH, gl.SliceLayout(0, COPIED))
    if LAST < WIDTH // 8 - 1:
        pair = gl.minimum(pair // 8, LAST) * 8 + pair % 8
    at = (slot.to(gl.int64) * stride_t)[:, None] + pair[None, :]
    copy_to_shared(C.index(0), whole_rows(cosine, at))
    copy_to_shared(C.index(1), whole_rows(sine, at))
    async_copy.commit_group()


@gluon.jit
def scores_of_offsets(O, C, label, any_class):  # noqa: E741
    """What offsets of keys add to the scores [columns, T] of a block of slots."""
    scores = gl.full([O.shape[1], C.shape[1]], 0.0, gl.float32, TRANSPOSED)
    scores = mma_v2(offsets_of(O, 0), tables_of(C, 0), scores)
    scores = mma_v2(offsets_of(O, 1), tables_of(C, 1), scores)
    if any_class > 0:
        more = gl.full([O.shape[1], C.shape[1]], 0.0, gl.float32, TRANSPOSED)
        more = mma_v2(offsets_of(O, 2), tables_of(C, 0), more)
        more = mma_v2(offsets_of(O, 3), tables_of(C, 1), more)
        scores += more * gl.convert_layout(label, gl.SliceLayout(0, TRANSPOSED))[None, :]
    return scores * (1 / OF_OFFSETS)


@gluon.jit
def offsets_of(O, index):  # noqa: E741
    return O.index(index).load(gl.DotOperandLayout(0, TRANSPOSED, 2))


@gluon.jit
def tables_of(C, index):
    return C.index(index).permute((1, 0)).load(gl.DotOperandLayout(1, TRANSPOSED, 2))
