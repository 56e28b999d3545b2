"""How the kernels for latent keys are launched: weights, sums, join."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import launch_hopper as hopper
from .latent import latent_weights_kernel
from .latent_sums import latent_join_kernel, latent_sums_kernel
from .latent_tables import CHUNK, PIECE, WORD, LatentTables, Layout
from .launch import (
    INTERPRETED,
    choose_splits,
    in_rows,
    longest,
    multiprocessors,
    options_of,
    overlapped,
    power_of_two,
    shares,
    types_of,
)
from .start import Constants, Part, start_kernel

MAX_COLUMNS = 32  # queries of a program, all heads and positions
# Slots of a block and warps: the first that gives every multiprocessor a program, or the last.
SHAPES = ((64, 4), (32, 4))
SHORTEST = 32  # slots: what all blocks are multiples of
STAGES = 2  # chunks of weights in flight
SUM_SHAPE = 64, 4  # slots at a time, warps
MOST_SPLITS = 16  # joining 32 takes as long as a short text's sums
JOINED = 2048  # sums that a program joins: their loads wait for memory together
JOIN_CHUNK = 128, 512  # its features; one and more a thread, so that a thread adds up all splits
SUMS_AT_ONCE = 4  # programs of sums that a multiprocessor runs
ALIGNED = 128  # bytes that parts of a buffer begin at multiples of


def launch_latent(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    tables: LatentTables,
    scale: float,
    start: Tensor | None,
    end: Tensor | None,
    window: int | None,
    softcap: float | None,
    mask: Tensor | None = None,
    pages: Tensor | None = None,
    by_group: bool = False,
) -> Tensor:
    """`decode_latent.latent_on_kernel`, for any strides but the last of queries, keys and
    values."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    length, page, pages_stride = keys.shape[2], 0, 0
    if pages is not None:
        page, length, pages_stride = length, length * pages.shape[1], pages.stride(0)
    keys, values = keys.view(torch.int32), values.view(torch.int32)
    key_stride_b, _, key_stride_t, _ = keys.stride()
    value_stride_b, _, value_stride_t, _ = values.stride()
    mask, mask_stride = in_rows(mask)
    if sine.stride() != cosine.stride():
        cosine, sine = cosine.contiguous(), sine.contiguous()
    table_stride_b, *table_strides = cosine.stride()
    attended = longest(length, query.shape[2], window)
    shape = latent_shape(
        tables.layout,
        tables.epsilon,
        query.device,
        (query.dtype, cosine.dtype, *types_of(tables.norm, pages, start, end, mask)),
        query.shape,
        (*query.stride()[:3], key_stride_t, value_stride_t, *table_strides),
        (shares(length, SHORTEST), shares(attended, SHORTEST), page),
        (scale, softcap, window),
        SHAPES,
        by_group,
        hopper.rows_fit(cosine, sine),
        tables.whole is not None,
    )
    scratch = query.new_empty(shape.scratch, dtype=torch.uint8)
    weights, block_terms, partial, partial_terms = shape.parts
    bounds = pages, start, end, mask
    of_keys: tuple[Tensor | None, ...]
    if shape.kernels[0] is latent_weights_kernel:
        of_keys = tables.chunks, tables.weight, tables.offset, tables.norm
    else:
        whole = tables.weight if tables.whole is None else tables.whole
        of_keys = tables.behind, whole, tables.unit, tables.offset, tables.norm
    weigh = (
        query,
        keys,
        values,
        tables.items,
        *of_keys,
        cosine,
        sine,
        weights,
        block_terms,
        *bounds,
    )
    strides = pages_stride, mask_stride, key_stride_b, value_stride_b
    table_stride_b = table_stride_b if len(cosine) > 1 else 0
    numbers: tuple[int, ...] = *strides, table_stride_b, length
    weights_kernel, sums_kernel = shape.kernels
    start_kernel(weights_kernel, shape.grids[0], shape.constants[0], weigh, numbers, scratch)
    add = keys, values, tables.items, weights, block_terms, partial, partial_terms, *bounds
    numbers = *strides, length, shape.splits, shape.blocks
    start_kernel(sums_kernel, shape.grids[1], shape.constants[1], add, numbers, scratch)
    output = query.new_empty(shape.output)
    join = partial, partial_terms, output, tables.place_of, tables.step
    numbers = (shape.splits,)
    start_kernel(latent_join_kernel, shape.grids[2], shape.constants[2], join, numbers, scratch)
    return output


class LatentShape(NamedTuple):
    """How a call is shared out among programs.

    Attributes:
        kernels: of weights and of sums.
        constants, grids: of the kernels of weights, of sums, and of what joins them.
        scratch: bytes of what one kernel writes and another reads.
        parts: of these: weights, terms of blocks, partial sums and terms of splits.
        output: size.
        splits: of the slots, that are summed up by themselves.
        blocks: of slots.
    """

    kernels: tuple[Any, Any]
    constants: tuple[Constants, Constants, Constants]
    grids: tuple[tuple[int, int, int], ...]
    scratch: int
    parts: tuple[Part, Part, Part, Part]
    output: tuple[int, ...]
    splits: int
    blocks: int


@functools.lru_cache(maxsize=4096)  # of each layer, for SHORTEST steps
def latent_shape(
    layout: Layout,
    epsilon: float,
    device: torch.device,
    types: tuple[torch.dtype | None, ...],
    queries: tuple[int, int, int, int],
    strides: tuple[int, ...],
    lengths: tuple[int, int, int],
    softmax: tuple[float, float | None, int | None],
    shapes: tuple[tuple[int, int], ...],
    by_group: bool,
    rows_fit: bool,
    whole: bool,
) -> LatentShape:
    """Of `queries` [b, h, s, d].

    Args:
        types: of queries and cosines, and of all tensors that need not be there.
        strides: of queries, and of keys, values and cosines within a sequence.
        lengths: slots and those that are attended to at most, in SHORTEST; slots of a page.
        softmax: scale, cap and window.
        shapes: as `SHAPES`.
        rows_fit: whether those of cosines do, see `launch_hopper.rows_fit`.
        whole: whether weights of keys come in whole numbers.
    """
    (batch, heads, positions, _), (length, attended, page) = queries, lengths
    columns, processors = heads * positions, multiprocessors(device)
    per_span = layout.queries_of_span(heads, positions)
    per_program = power_of_two(per_span, 16, MAX_COLUMNS)
    tiles = shares(per_span, per_program)
    per_sum = power_of_two(columns, 16, MAX_COLUMNS)
    sum_tiles = shares(columns, per_sum)
    programs = batch * layout.spans * tiles
    fitting = [x for x in shapes if shares(attended, x[0] // SHORTEST) * programs >= processors]
    block, warps = fitting[0] if fitting else shapes[-1]
    exact, normed, paged = types[0] == torch.float32, types[2] is not None, page > 0
    in_gluon = hopper.runs_on(device) and not (exact or normed or paged)
    ring = hopper.Ring()
    if in_gluon and rows_fit and hopper.enough_tiles(attended * SHORTEST, batch, processors):
        ring = hopper.ring_of(layout, per_span, 1 if whole else 2, device)
    if ring.stages:
        block = hopper.TILE // 2
    blocks, padded_columns = shares(length, block // SHORTEST), per_sum * sum_tiles
    most = shares(attended, block // SHORTEST)
    sums = None
    if in_gluon:
        sequences = batch * sum_tiles
        sums = hopper.sums_shape(layout, per_sum, block, sequences, most, device, processors)
    if sums is None:
        pieces = (layout.items - layout.first_item) // (PIECE // WORD)
        splits = choose_splits(most, batch * sum_tiles * pieces, SUMS_AT_ONCE * processors)
        splits = min(splits, MOST_SPLITS)
    else:
        pieces, splits = sums.programs, sums.splits
    constants = latent_constants(
        layout,
        epsilon,
        device,
        types,
        (heads, positions),
        strides,
        softmax,
        page,
        (block, warps, STAGES),
        (per_program, tiles),
        (per_sum, sum_tiles),
        power_of_two(splits, 1, splits * 2),
        by_group,
        overlapped(device),
        (ring, sums and sums[:2]),
    )
    grid = (blocks, batch, layout.spans * tiles)
    if ring.stages:  # they stay, and share the tiles of a sequence
        grid = (min(max(1, processors // batch), shares(blocks, 2)), batch, 1)
    sizes = (
        ((batch, blocks, 2, padded_columns, block), torch.float32 if exact else torch.float16),
        ((batch, blocks, 4, padded_columns), torch.float32),
        ((batch, splits, columns, WORD * layout.items), torch.float32),
        ((batch, splits, 4, columns), torch.float32),
    )
    parts, first = [], 0
    for size, dtype in sizes:
        parts.append(Part(first, size, dtype))
        first += shares(math.prod(size) * dtype.itemsize, ALIGNED) * ALIGNED
    return LatentShape(
        kernels=(
            hopper.weights_kernel() if ring.stages else latent_weights_kernel,
            hopper.sums_kernel() if sums else latent_sums_kernel,
        ),
        constants=constants,
        grids=(
            grid,
            (pieces, splits, batch * sum_tiles),
            (columns, shares(layout.features, constants[2].named["CHUNK"]), batch),
        ),
        scratch=first,
        parts=(parts[0], parts[1], parts[2], parts[3]),
        output=(
            (layout.groups, batch * columns // layout.groups, layout.features)
            if by_group
            else (batch, heads, positions, layout.features)
        ),
        splits=splits,
        blocks=blocks,
    )


@functools.lru_cache(maxsize=4096)
def latent_constants(
    layout: Layout,
    epsilon: float,
    device: torch.device,
    types: tuple[torch.dtype | None, ...],
    queries: tuple[int, int],
    strides: tuple[int, ...],
    softmax: tuple[float, float | None, int | None],
    page: int,
    program: tuple[int, int, int],
    weights: tuple[int, int],
    sums: tuple[int, int],
    splits: int,
    by_group: bool,
    overlap: bool,
    in_gluon: tuple[hopper.Ring, tuple[int, int] | None],
) -> tuple[Constants, Constants, Constants]:
    """Of the kernels of weights, of sums, and of what joins them.

    Args:
        queries: heads and positions.
        program: slots of a block, warps and stages.
        weights, sums: queries of a program and programs that share them, of either kernel.
        splits: at most.
        in_gluon: the ring of the kernel of weights, without stages if it is in Triton; warps and
            stages of that of sums, or None.
    """
    (heads, positions), (block, warps, stages) = queries, program
    exact, columns, padded_columns = types[0] == torch.float32, heads * positions, sums[0] * sums[1]
    precision = "ieee" if exact else "tf32"
    numbers_of_weights = (
        *strides,
        heads,
        positions,
        layout.chunks,
        padded_columns,
        *softmax,
        float(layout.octave_k),
        float(layout.octave_v),
        layout.header_k,
        layout.header_v,
        epsilon,
    )
    if in_gluon[0].stages:
        per_span = layout.queries_of_span(heads, positions)
        named = hopper.constants_of_weights(layout, positions, per_span, in_gluon[0])
        options = {"num_warps": hopper.GROUP}
    else:
        named = {
            "GROUPS": layout.groups,
            "BLOCKS": layout.blocks,
            "PAIRS": layout.pairs,
            "PADDED": layout.padded,
            "HEADS": layout.heads,
            "SPANS": layout.spans,
            "TOGETHER": bool(layout.together),
            "COLUMNS": weights[0],
            "TILES": weights[1],
            "CHUNK": CHUNK,
            "PAGE": page,
            "BLOCK": block,
            "MULTIPLE": positions > 1,
            # Squares of fp16 numbers do not fit fp16.
            "SQUARES": tl.float32 if exact or INTERPRETED else tl.bfloat16,
            "PRECISION": precision,
            "STAGES": stages,
            "OVERLAP": overlap,
        }
        options = {"num_warps": warps, "num_stages": stages}
    weigh = Constants(device, options, numbers_of_weights, **named)
    numbers_of_sums = (
        *strides[3:5],
        columns,
        positions,
        layout.items,
        layout.key_items,
        layout.first_item // (PIECE // WORD),
        padded_columns,
        softmax[-1],
    )
    if in_gluon[1] is not None:
        named = hopper.constants_of_sums(layout, *in_gluon[1], *sums, block)
        options = {"num_warps": in_gluon[1][0]}
    else:
        named = {
            "COLUMNS": sums[0],
            "TILES": sums[1],
            "PIECE": PIECE,
            "PAGE": page,
            "BLOCK": block,
            "SLOTS": min(block, SUM_SHAPE[0]),
            "PRECISION": precision,
            "OVERLAP": overlap,
        }
        options = options_of(SUM_SHAPE[1], overlap)
    add = Constants(device, options, numbers_of_sums, **named)
    join = Constants(
        device,
        options_of(4, overlap),
        (
            columns,
            columns // layout.groups if by_group else columns,
            WORD * layout.items,
            layout.features,
        ),
        PARTS=layout.parts,
        CHUNK=power_of_two(min(layout.features, JOINED // splits), *JOIN_CHUNK),
        SPLITS=splits,
        OVERLAP=overlap,
    )
    return weigh, add, join
