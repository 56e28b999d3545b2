"""Where the kernels in Gluon, for Hopper, take the place of those in Triton for coded latent keys,
and what they are launched with."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .latent_places import WORD
from .latent_tables import CHUNK, MAX_PAIRS, PLACES, Layout
from .launch import (
    INTERPRETED,
    all_shared_bytes,
    choose_splits,
    power_of_two,
    shared_bytes,
    shares,
)

TILE = 128  # slots of a program of weights at a time
MOST_STAGES = 8  # of its ring
FEWEST_STAGES = 4  # where weights are kept beside it
MOST_COLUMNS = 16  # queries of half of the heads of a span
MOST_PAIRS = 128  # of a head
GROUP = 4  # warps that act as one
SUM_REGISTERS = {16: 128, 32: 168}  # of a thread of sums at most, by padded queries
REGISTERS = 1 << 16  # of a multiprocessor
SUM_STAGES = 4  # of its ring at most
SUM_START = 6  # blocks that could be summed up while a program starts, stores and is joined
SUM_BLOCKS = 8  # of a program at least
SUM_SLOWED = 0.6  # part of its time that a program takes longer for each that runs beside it
MOST_SPLITS = 32
SCRATCH = 2560  # bytes of shared memory that the compiler takes in the kernel of weights, at most
RESERVED = 1024  # bytes of shared memory that a program takes beside its own


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device. Gluon is not stable yet, so releases of Triton that are
    not known to have what they take do without."""
    release = tuple(int(x) for x in triton.__version__.split(".")[:2])
    if INTERPRETED or device.type != "cuda" or not (3, 6) <= release <= (3, 9):
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def weights_kernel() -> Any:
    # Here, since older releases of Triton have no Gluon.
    from .latent_hopper import latent_weights_on_hopper

    return latent_weights_on_hopper


@functools.cache
def sums_kernel() -> Any:
    from .latent_sums_hopper import latent_sums_on_hopper

    return latent_sums_on_hopper


def rows_fit(cosine: Tensor, sine: Tensor) -> bool:
    """Whether the kernel of weights can read tables [b, t, f]: in rows of whole words of 16 bytes,
    of which programs of other kinds need not know."""
    *_, stride_t, stride_p = cosine.stride()
    places = cosine.data_ptr() | sine.data_ptr() | stride_t * cosine.itemsize
    return stride_p == 1 and places % 16 == 0


def enough_tiles(slots: int, sequences: int, processors: int) -> bool:
    """Whether most processors have a tile of weights: with fewer, Triton's programs are faster,
    which are shorter."""
    return 4 * shares(slots, TILE) * sequences >= 3 * processors


class Ring(NamedTuple):
    """Shared memory of the kernel of weights.

    Attributes:
        stages: of the ring; 0 if the kernel cannot run a layout.
        kept: chunks of weights that may stay there; 0 where they go through the ring.
        size: bytes of a code, and of a weight.
    """

    stages: int = 0
    kept: int = 0
    size: int = 0


@functools.cache
def ring_of(layout: Layout, per_span: int, size: int, device: torch.device) -> Ring:
    """What shared memory has room for.

    Args:
        per_span: queries of a span.
        size: bytes of a code, and of a weight.
    """
    known = layout.spans == 2 and layout.heads > 1 and layout.heads * layout.padded == MAX_PAIRS
    wide = per_span > 2 * MOST_COLUMNS or layout.blocks * layout.pairs > MOST_PAIRS
    if wide or not known:
        return Ring()
    keys = 2 * layout.spans * MAX_PAIRS  # rebuilt of a slot in one block of pairs
    # Queries, queries times offsets, scores that are passed on; cosines and sines.
    beside = _per_half(per_span) * (2 * layout.blocks * keys + 32 * _width(layout) + 16 * TILE)
    beside += 2 * TILE * _width(layout) + SCRATCH
    room = (all_shared_bytes(device) - beside) // (size * CHUNK)
    kept = (room - FEWEST_STAGES * TILE) // keys  # the same for all layers that it is enough for
    if layout.chunks <= kept:
        return Ring(min((room - kept * keys) // TILE, MOST_STAGES), kept, size)
    stages = room // (TILE + keys)
    return Ring(min(stages, MOST_STAGES), 0, size) if stages > 1 else Ring()


def _width(layout: Layout) -> int:
    """Rotary pairs of a head, padded."""
    return power_of_two(layout.blocks * layout.pairs, 16, MOST_PAIRS)


def _per_half(per_span: int) -> int:
    """Queries of half of the heads of a span, padded."""
    return power_of_two(per_span // 2, 8, MOST_COLUMNS)


def constants_of_weights(
    layout: Layout, positions: int, per_span: int, ring: Ring
) -> dict[str, Any]:
    """Constant arguments of the kernel of weights."""
    return {
        "GROUPS": layout.groups,
        "BLOCKS": layout.blocks,
        "PAIRS": layout.pairs,
        "PADDED": layout.padded,
        "HEADS": layout.heads,
        "COLUMNS": _per_half(per_span),
        "CHUNK": CHUNK,
        "BLOCK": TILE // 2,
        "MULTIPLE": positions > 1,
        "WIDTH": _width(layout),
        "STAGES": ring.stages,
        "KEPT": ring.kept,
    }


class SumsShape(NamedTuple):
    """How the kernel of sums shares out a call.

    Attributes:
        stages: of a program's ring.
        programs: that share the pieces of a sequence.
        splits: of the slots.
    """

    stages: int
    programs: int
    splits: int


def sums_shape(
    layout: Layout,
    columns: int,
    block: int,
    sequences: int,
    blocks: int,
    device: torch.device,
    processors: int,
) -> SumsShape | None:
    """None where the kernel of sums in Triton is faster, or its ring does not fit.

    Args:
        columns: queries of a program, padded.
        block: slots of one of `blocks`.
        sequences: times programs that share the queries of one.
        processors: of the device.
    """
    parts = layout.key_items - layout.first_item, layout.items - layout.key_items
    programs = sum(shares(items, PLACES // WORD) for items in parts)
    for at_once in range(REGISTERS // (32 * GROUP * SUM_REGISTERS[columns]), 0, -1):
        room = shared_bytes(device) // at_once - RESERVED
        stages = min(sum_stages(room, layout, columns, block), SUM_STAGES)
        if stages > 2:
            break
    else:
        return None
    most = min(blocks // SUM_BLOCKS, MOST_SPLITS)
    if most == 0:
        return None
    of_sequences = sequences * programs
    splits = choose_splits(blocks, of_sequences, processors, SUM_START, at_once, SUM_SLOWED, most)
    if 2 * of_sequences * splits < processors:  # Triton's programs are shorter, and more
        return None
    return SumsShape(stages, programs, splits)


def _chunks(layout: Layout) -> int:
    """Of 16 bytes, that hold what a program of sums needs of a row, which begins at any word."""
    return shares(layout.reach + 3, 4)


def sum_stages(room: int, layout: Layout, columns: int, block: int) -> int:
    """Stages of the ring of sums that so many bytes of shared memory have room for. Each holds
    what is needed of rows, and gaps, weights and maxima of a block; beside them stand weights of
    two blocks that are scaled, and all is in tiles of 16 slots of those."""
    stage = 16 * block * _chunks(layout) + 4 * block + columns * (2 * block + 4)
    tile = 32 * columns
    return (room // tile * tile - 4 * block * columns) // stage


def constants_of_sums(
    layout: Layout, stages: int, columns: int, tiles: int, block: int
) -> dict[str, Any]:
    """Constant arguments of the kernel of sums for `columns` queries of a program, `tiles` programs
    that share them, and blocks of so many slots."""
    return {
        "COLUMNS": columns,
        "TILES": tiles,
        "PLACES": PLACES,
        "BLOCK": block,
        "WARPS": GROUP,
        "STAGES": stages,
        "CHUNKS": _chunks(layout),
    }
