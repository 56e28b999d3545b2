"""Where the kernels in Gluon, for Hopper, take the place of those in Triton for coded latent keys,
and what they are launched with."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .latent_tables import CHUNK, MAX_PAIRS, PIECE, Layout
from .launch import INTERPRETED, power_of_two, shared_bytes

TILE = 128  # slots of a program of weights at a time
MOST_STAGES = 8  # of its ring
FEWEST_STAGES = 3  # where weights are kept beside it
MOST_COLUMNS = 16  # queries of half of the heads of a span
MOST_PAIRS = 128  # of a head
GROUP = 4  # warps that act as one
SUM_WARPS = 2  # of a program of sums
SUM_PLACES = PIECE  # of each of its warps
SUMS_AT_ONCE = 4  # programs that a multiprocessor runs
SUM_BLOCKS = 32  # of slots, from which on a program is faster than Triton's: it starts slowly


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


class Ring(NamedTuple):
    """Shared memory of the kernel of weights.

    Attributes:
        stages: of the ring; 0 if the kernel cannot run a layout.
        kept: chunks of weights that stay there; 0 where they go through the ring.
    """

    stages: int = 0
    kept: int = 0


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
    # Queries, queries times offsets, scores that are passed on and laid out anew.
    beside = _per_half(per_span) * (2 * layout.blocks * keys + 32 * _width(layout) + 24 * TILE)
    room = (shared_bytes(device) - beside) // (size * CHUNK)
    alone = (room - keys * layout.chunks) // TILE
    if alone >= FEWEST_STAGES:
        return Ring(min(alone, MOST_STAGES), layout.chunks)
    stages = room // (TILE + keys)
    return Ring(min(stages, MOST_STAGES)) if stages > 1 else Ring()


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


def constants_of_sums(columns: int, tiles: int, block: int) -> dict[str, Any]:
    """Constant arguments of the kernel of sums for `columns` queries of a program, `tiles` programs
    that share them, and blocks of so many slots."""
    return {
        "COLUMNS": columns,
        "TILES": tiles,
        "PIECE": PIECE,
        "PLACES": SUM_PLACES,
        "BLOCK": block,
        "WARPS": SUM_WARPS,
    }
