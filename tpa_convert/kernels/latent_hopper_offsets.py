"""What offsets of keys give to scores in `latent_hopper.py`: only cosines and sines differ from
slot to slot, so that queries and offsets are multiplied before.
"""

# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .latent_hopper_scores import (
    PAIRS_OF_SPAN,
    QUERIES,
    SCORES,
    SPANS,
    columns_of,
    load_row,
    whole_rows,
)

EIGHT = gl.constexpr(8)  # numbers of 16 bits that a thread loads at once
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
def load_tables(
    cosine,
    sine,
    block,
    length,
    stride_t,
    PAIRS: gl.constexpr,  # of a head
    WIDTH: gl.constexpr,
    T: gl.constexpr,
):
    """Cosines and sines [T, pairs] of a block of slots, for products."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, EIGHT)
    slot = gl.minimum(block * T + gl.arange(0, T, gl.SliceLayout(1, LEFT)), length - 1)
    pair = gl.arange(0, WIDTH, gl.SliceLayout(0, LEFT))[None, :]
    of_row = (slot.to(gl.int64) * stride_t)[:, None]
    cos = load_row(whole_rows(cosine, of_row), 0, pair, PAIRS, WIDTH)
    return cos, load_row(whole_rows(sine, of_row), 0, pair, PAIRS, WIDTH)


@gluon.jit
def scores_of_offsets(O, cos, sin, label, any_class):  # noqa: E741
    """What offsets of keys add to the scores [T, columns] of a block of slots."""
    T: gl.constexpr = label.shape[0]
    cos = cos.to(O.dtype)
    sin = sin.to(O.dtype)
    scores = gl.full([T, O.shape[1]], 0.0, gl.float32, SCORES)
    scores = mma_v2(cos, offsets_of(O, 0), scores)
    scores = mma_v2(sin, offsets_of(O, 1), scores)
    if any_class > 0:
        more = gl.full([T, O.shape[1]], 0.0, gl.float32, SCORES)
        more = mma_v2(cos, offsets_of(O, 2), more)
        more = mma_v2(sin, offsets_of(O, 3), more)
        scores += more * gl.convert_layout(label, gl.SliceLayout(1, SCORES))[:, None]
    return scores * (1 / OF_OFFSETS)


@gluon.jit
def offsets_of(O, index):  # noqa: E741
    return O.index(index).permute((1, 0)).load(gl.DotOperandLayout(1, SCORES, EIGHT))
