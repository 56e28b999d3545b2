"""How the kernels for latent keys are launched: weights, sums, join."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent import latent_weights_kernel
from .latent_sums import latent_join_kernel, latent_sums_kernel
from .latent_tables import CHUNK, MAX_PAIRS, PIECE, WORD, LatentTables, Layout
from .launch import (
    INTERPRETED,
    choose_splits,
    in_rows,
    longest,
    multiprocessors,
    options_of,
    overlapped,
    power_of_two,
    shared_bytes,
    shares,
)
from .start import Constants, start_kernel

MAX_COLUMNS = 32  # queries of a program, all heads and positions
# Slots of a block and warps: the first that gives every multiprocessor a program, or the last.
SHAPES = ((64, 4), (32, 4))
STAGES = 2  # chunks of weights in flight
TILE = 128  # slots of a program at a time in Gluon's kernel of weights
MOST_STAGES = 4  # of its ring
SUM_SHAPE = 64, 4  # slots at a time, warps
MOST_SPLITS = 16  # joining 32 takes as long as a short text's sums
SUMS_AT_ONCE = 4  # programs of sums that a multiprocessor runs
# Of Gluon's kernel of sums: warps, places of each, and programs that a multiprocessor runs.
HOPPER_SUMS = 4, PIECE, 2


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
) -> Tensor:
    """`decode_latent.decode_latent`, for any strides but the last of queries, keys and values."""
    layout = tables.layout
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, positions, _ = query.shape
    length, page = keys.shape[2], 0
    if pages is not None:
        page, length = length, length * pages.shape[1]
    keys, values = keys.view(torch.int32), values.view(torch.int32)
    mask, mask_stride = in_rows(mask)
    if sine.stride() != cosine.stride():
        cosine, sine = cosine.contiguous(), sine.contiguous()
    shape = latent_shape(
        layout,
        query.device,
        query.dtype,
        (batch, heads, positions),
        length,
        longest(length, positions, window),
        page,
        (tables.items.shape[0], *tables.place_of.shape),
        SHAPES,
        tables.norm is not None,
    )
    weights = query.new_empty(shape.weights, dtype=shape.weights_dtype)
    block_terms = query.new_empty(shape.block_terms, dtype=torch.float32)
    bounds = (pages, start, end, mask, 0 if pages is None else pages.stride(0), mask_stride)
    strides = keys.stride(0), keys.stride(2), values.stride(0), values.stride(2)
    cached = keys, values, tables.items
    weigh = (
        query,
        *cached,
        tables.chunks,
        tables.weight,
        tables.offset,
        tables.norm,
        cosine,
        sine,
        weights,
        block_terms,
        *bounds,
        *query.stride()[:3],
        *strides,
        cosine.stride(0) if cosine.shape[0] > 1 else 0,
        *cosine.stride()[1:],
        heads,
        positions,
        length,
        tables.chunks.shape[0] - 1,
        shape.padded_columns,
        scale,
        softcap,
        window,
        float(layout.octave_k),
        float(layout.octave_v),
        layout.header_k,
        layout.header_v,
        tables.epsilon,
    )
    start_kernel(shape.weights_kernel, shape.grids[0], shape.constants[0], weigh)
    partial = query.new_empty(shape.partial, dtype=torch.float32)
    partial_terms = query.new_empty(shape.partial_terms, dtype=torch.float32)
    columns = heads * positions
    add = (
        *cached,
        weights,
        block_terms,
        partial,
        partial_terms,
        *bounds,
        *strides,
        columns,
        positions,
        length,
        shape.items,
        layout.key_items,
        layout.first_item // (PIECE // WORD),
        shape.padded_columns,
        window,
        shape.splits,
        shape.blocks,
    )
    start_kernel(shape.sums_kernel, shape.grids[1], shape.constants[1], add)
    output = query.new_empty(shape.output)
    join = (
        partial,
        partial_terms,
        output,
        tables.place_of,
        tables.step,
        columns,
        WORD * shape.items,
        shape.output[-1],
        shape.splits,
    )
    start_kernel(latent_join_kernel, shape.grids[2], shape.constants[2], join)
    return output


class LatentShape(NamedTuple):
    """How a call is shared out among programs.

    Attributes:
        weights_kernel, sums_kernel: that make the weights, and sum up what they weigh.
        constants, grids: of the kernels of weights, of sums, and of what joins them.
        weights, block_terms, partial, partial_terms, output: sizes of the tensors that they write.
        weights_dtype: of the first.
        padded_columns: queries, with those that fill up programs.
        items: of the tables.
        splits: of the slots, that are summed up by themselves.
        blocks: of slots.
    """

    weights_kernel: Any
    sums_kernel: Any
    constants: tuple[Constants, Constants, Constants]
    grids: tuple[tuple[int, int, int], ...]
    weights: tuple[int, ...]
    block_terms: tuple[int, ...]
    partial: tuple[int, ...]
    partial_terms: tuple[int, ...]
    output: tuple[int, ...]
    weights_dtype: torch.dtype
    padded_columns: int
    items: int
    splits: int
    blocks: int


@functools.lru_cache(maxsize=512)  # all layers of a step ask for the same
def latent_shape(
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
    queries: tuple[int, int, int],
    length: int,
    attended: int,
    page: int,
    tables: tuple[int, int, int],
    shapes: tuple[tuple[int, int], ...],
    normed: bool,
) -> LatentShape:
    """Of `queries` [b, h, s] on `length` slots, of which each attends to so many at most.

    Args:
        tables: items, parts and features.
        shapes: as `SHAPES`.
        normed: whether keys have a norm.
    """
    (batch, heads, positions), (items, parts, features) = queries, tables
    columns, processors = heads * positions, multiprocessors(device)
    per_span = layout.heads * (heads // layout.groups) * positions
    per_program = power_of_two(per_span, 16, MAX_COLUMNS)
    tiles = shares(per_span, per_program)
    per_sum = power_of_two(columns, 16, MAX_COLUMNS)
    sum_tiles = shares(columns, per_sum)
    programs = batch * layout.spans * tiles
    fitting = [x for x in shapes if shares(attended, x[0]) * programs >= processors]
    block, warps = fitting[0] if fitting else shapes[-1]
    plain = not (normed or page or dtype == torch.float32)
    enough = shares(attended, TILE) * batch >= processors
    stages = hopper_stages(layout, per_span, device) if plain and enough else 0
    if stages:
        block = TILE // 2
    blocks, padded_columns = shares(length, block), per_sum * sum_tiles
    pieces = (items - layout.first_item) // (PIECE // WORD)
    sums_kernel, sharing, at_once = latent_sums_kernel, pieces, SUMS_AT_ONCE
    if plain and hopper_sums(device):
        sum_warps, places, programs = HOPPER_SUMS
        fewer = shares(pieces * PIECE, sum_warps * places)
        if batch * sum_tiles * fewer * min(shares(attended, block), MOST_SPLITS) >= processors:
            sums_kernel, sharing, at_once = hopper_sums_kernel(), fewer, programs
    sequences = batch * sum_tiles * sharing
    splits = choose_splits(shares(attended, block), sequences, at_once * processors)
    splits = min(splits, MOST_SPLITS)
    chunk = power_of_two(features, 16, 64)
    overlap = overlapped(device)
    weigh, add = latent_constants(
        layout,
        device,
        dtype,
        positions > 1,
        page,
        (block, warps, STAGES),
        (per_program, tiles),
        (per_sum, sum_tiles),
        overlap,
    )
    weights_kernel, weights_grid = latent_weights_kernel, (blocks, batch, layout.spans * tiles)
    if stages:
        weights_kernel, programs = hopper_kernel(), max(1, processors // batch)
        weights_grid = min(programs, shares(length, TILE)), batch, 1
        weigh = hopper_constants(layout, device, positions > 1, per_half(per_span), stages)
    if sums_kernel is not latent_sums_kernel:
        add = hopper_sums_constants(device, (per_sum, sum_tiles), block, HOPPER_SUMS[:2])
    joined = join_constants(device, parts, chunk, power_of_two(splits, 1, MOST_SPLITS), overlap)
    return LatentShape(
        weights_kernel=weights_kernel,
        sums_kernel=sums_kernel,
        constants=(weigh, add, joined),
        grids=(
            weights_grid,
            (sharing, splits, batch * sum_tiles),
            (columns, shares(features, chunk), batch),
        ),
        weights=(batch, blocks, 2, padded_columns, block),
        block_terms=(batch, blocks, 4, padded_columns),
        partial=(batch, splits, columns, WORD * items),
        partial_terms=(batch, splits, 4, columns),
        output=(batch, heads, positions, features),
        weights_dtype=torch.float32 if dtype == torch.float32 else torch.float16,
        padded_columns=padded_columns,
        items=items,
        splits=splits,
        blocks=blocks,
    )


@functools.lru_cache(maxsize=512)
def latent_constants(
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
    multiple: bool,
    page: int,
    program: tuple[int, int, int],
    weights: tuple[int, int],
    sums: tuple[int, int],
    overlap: bool,
) -> tuple[Constants, Constants]:
    """Of the kernels of weights and of sums.

    Args:
        multiple: whether there are several query positions.
        program: slots of a block, warps and stages.
        weights, sums: queries of a program and programs that share them, of either kernel.
    """
    block, warps, stages = program
    exact = dtype == torch.float32
    precision = "ieee" if exact else "tf32"
    weigh = Constants(
        device,
        {"num_warps": warps, "num_stages": stages},
        GROUPS=layout.groups,
        BLOCKS=layout.blocks,
        PAIRS=layout.pairs,
        PADDED=layout.padded,
        HEADS=layout.heads,
        SPANS=layout.spans,
        TOGETHER=bool(layout.together),
        COLUMNS=weights[0],
        TILES=weights[1],
        CHUNK=CHUNK,
        PAGE=page,
        BLOCK=block,
        MULTIPLE=multiple,
        # Squares of fp16 numbers do not fit fp16.
        SQUARES=tl.float32 if exact or INTERPRETED else tl.bfloat16,
        PRECISION=precision,
        STAGES=stages,
        OVERLAP=overlap,
    )
    add = Constants(
        device,
        options_of(SUM_SHAPE[1], overlap),
        COLUMNS=sums[0],
        TILES=sums[1],
        PIECE=PIECE,
        PAGE=page,
        BLOCK=block,
        SLOTS=min(block, SUM_SHAPE[0]),
        PRECISION=precision,
        OVERLAP=overlap,
    )
    return weigh, add


def per_half(per_span: int) -> int:
    """Queries of half of the heads of a span, padded, as `latent_hopper.py` shares them out."""
    return power_of_two(per_span // 2, 8, 16)


@functools.cache
def gluon_known() -> bool:
    """Whether this release of Triton is known to have what kernels in Gluon take: it is not stable
    yet."""
    release = tuple(int(x) for x in triton.__version__.split(".")[:2])
    return not INTERPRETED and (3, 6) <= release <= (3, 9)


@functools.cache
def hopper_kernel() -> Any:
    """The kernel of weights in Gluon, or None where it cannot be had."""
    if not gluon_known():
        return None
    from .latent_hopper import latent_weights_on_hopper

    return latent_weights_on_hopper


@functools.cache
def hopper_sums_kernel() -> Any:
    """The kernel of sums in Gluon, where it can be had."""
    from .latent_sums_hopper import latent_sums_on_hopper

    return latent_sums_on_hopper


def on_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def hopper_sums(device: torch.device) -> bool:
    """Whether the kernel of sums in Gluon runs on a device."""
    return gluon_known() and on_hopper(device)


@functools.cache
def hopper_stages(layout: Layout, per_span: int, device: torch.device) -> int:
    """Stages of the ring of `latent_hopper.py` that shared memory has room for; 0 if it cannot run
    this layout on this device.

    Args:
        per_span: queries of a span.
    """
    known = layout.spans == 2 and layout.heads > 1 and layout.heads * layout.padded == MAX_PAIRS
    if not known or per_span > 32 or hopper_kernel() is None:
        return 0
    if not on_hopper(device):
        return 0
    keys = 2 * layout.spans * MAX_PAIRS  # rebuilt of a slot in one block of pairs
    beside = layout.blocks * keys * (2 * per_half(per_span) + 4)  # queries, offsets
    stages = (shared_bytes(device) - beside) // (2 * CHUNK * (TILE + keys))
    return min(stages, MOST_STAGES) if stages > 1 else 0


@functools.lru_cache(maxsize=256)
def hopper_constants(
    layout: Layout, device: torch.device, multiple: bool, columns: int, stages: int
) -> Constants:
    """Of the kernel of weights in Gluon."""
    return Constants(
        device,
        {"num_warps": 4},
        GROUPS=layout.groups,
        BLOCKS=layout.blocks,
        PAIRS=layout.pairs,
        PADDED=layout.padded,
        HEADS=layout.heads,
        COLUMNS=columns,
        CHUNK=CHUNK,
        BLOCK=TILE // 2,
        MULTIPLE=multiple,
        STAGES=stages,
    )


@functools.lru_cache(maxsize=256)
def hopper_sums_constants(
    device: torch.device, sums: tuple[int, int], block: int, shape: tuple[int, int]
) -> Constants:
    """Of the kernel of sums in Gluon: `sums` as in `latent_constants`, `shape` as `HOPPER_SUMS`."""
    warps, places = shape
    return Constants(
        device,
        {"num_warps": warps},
        COLUMNS=sums[0],
        TILES=sums[1],
        PIECE=PIECE,
        PLACES=places,
        BLOCK=block,
        WARPS=warps,
    )


@functools.lru_cache(maxsize=256)
def join_constants(
    device: torch.device, parts: int, chunk: int, splits: int, overlap: bool
) -> Constants:
    """Of the joining kernel, for `chunk` features and at most so many splits."""
    options = options_of(4, overlap)
    return Constants(device, options, PARTS=parts, CHUNK=chunk, SPLITS=splits, OVERLAP=overlap)
