"""How a call of the kernels for latent keys is shared out among programs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl

from . import launch_hopper as hopper
from .latent import latent_weights_kernel
from .latent_places import WORD
from .latent_sums import latent_join_kernel, latent_sums_kernel
from .latent_tables import CHUNK, PIECE, Layout
from .launch import (
    INTERPRETED,
    choose_splits,
    multiprocessors,
    options_of,
    overlapped,
    power_of_two,
    shares,
)
from .start import Constants, Part, laid_out

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


class LatentShape(NamedTuple):
    """How a call is shared out among programs.

    Attributes:
        kernels, constants, grids: of weights, of sums, and of what joins them.
        whole: whether the first reads weights of keys in whole numbers.
        scratch: bytes of what one kernel writes and another reads.
        parts: of these, by the names that kernels have for them.
        output: size.
        splits: of the slots, that are summed up by themselves.
        blocks: of slots.
    """

    kernels: tuple[Any, Any, Any]
    constants: tuple[Constants, Constants, Constants]
    grids: tuple[tuple[int, int, int], ...]
    scratch: int
    parts: dict[str, Part]
    output: tuple[int, ...]
    splits: int
    blocks: int
    whole: bool


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
    enough = hopper.enough_tiles(attended * SHORTEST, batch, processors)
    if in_gluon and enough and rows_fit and types[0] == types[1]:
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
        (ring, sums and sums.stages),
    )
    grid = (blocks, batch, layout.spans * tiles)
    if ring.stages:  # they stay, and share the tiles of a sequence
        grid = (min(max(1, processors // batch), shares(blocks, 2)), batch, 1)
    parts, scratch = laid_out(
        {
            "weights": (
                (batch, blocks, 2, padded_columns, block),
                torch.float32 if exact else torch.float16,
            ),
            "block_terms": ((batch, blocks, 4, padded_columns), torch.float32),
            "partial": ((batch, splits, columns, WORD * layout.items), torch.float32),
            "partial_terms": ((batch, splits, 4, columns), torch.float32),
        }
    )
    return LatentShape(
        kernels=(
            hopper.weights_kernel() if ring.stages else latent_weights_kernel,
            hopper.sums_kernel() if sums else latent_sums_kernel,
            latent_join_kernel,
        ),
        constants=constants,
        grids=(
            grid,
            (pieces, splits, batch * sum_tiles),
            (columns, shares(layout.features, constants[2].named["CHUNK"]), batch),
        ),
        scratch=scratch,
        parts=parts,
        output=(
            (layout.groups, batch * columns // layout.groups, layout.features)
            if by_group
            else (batch, heads, positions, layout.features)
        ),
        splits=splits,
        blocks=blocks,
        whole=whole and ring.stages > 0,
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
    in_gluon: tuple[hopper.Ring, int | None],
) -> tuple[Constants, Constants, Constants]:
    """Of the kernels of weights, of sums, and of what joins them.

    Args:
        queries: heads and positions.
        program: slots of a block, warps and stages.
        weights, sums: queries of a program and programs that share them, of either kernel.
        splits: at most.
        in_gluon: the ring of the kernel of weights, without stages if it is in Triton; stages of
            that of sums, or None.
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
        layout.first_item,
        padded_columns,
        softmax[-1],
    )
    if in_gluon[1] is not None:
        named = hopper.constants_of_sums(layout, in_gluon[1], *sums, block)
        options = {"num_warps": hopper.GROUP, "maxnreg": hopper.SUM_REGISTERS[sums[0]]}
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
