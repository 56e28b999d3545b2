"""How the Triton kernels for numbers are launched, and what all launches share."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .split_kv import join_kernel, split_kernel
from .start import Constants, start_kernel

INTERPRETED = triton.knobs.runtime.interpret
MAX_COLUMNS = 64  # queries of a program, all heads and positions
SPLITS_AT_ONCE = 128  # that the joining kernel reads
COMPILERS_SHARED_BYTES = 7_000  # beside blocks and queries
# Slots of a block and blocks in flight: the first that fit. More slots make better use of the
# matrix unit, three blocks in flight of memory.
SHAPES = ((64, 3), (32, 3), (32, 2), (16, 2))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; on a CPU, where Triton's interpreter runs, a few so that there are splits."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def all_shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take."""
    if device.type != "cuda":
        return 1 << 30
    properties: Any = torch.cuda.get_device_properties(device)  # stubs lack the limit
    return properties.shared_memory_per_block_optin


def shared_bytes(device: torch.device) -> int:
    """What blocks and queries of it may take."""
    return all_shared_bytes(device) - COMPILERS_SHARED_BYTES


@functools.cache
def overlapped(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (Hopper on)."""
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


def options_of(warps: int, overlap: bool) -> dict[str, Any]:
    """Launch options of a kernel that starts while the one before it ends if `overlap` says so."""
    return {"num_warps": warps, **({"launch_pdl": True} if overlap else {})}


@functools.lru_cache(maxsize=4096)
def choose_splits(
    blocks: int,
    sequences: int,
    slots: int,
    start: int = 1,
    beside: int = 1,
    slowed: float = 0.0,
    most: int | None = None,
) -> int:
    """Splits of each sequence's `blocks`, `most` at most, that finish first when each of `slots`
    runs so many programs `beside` each other at most.

    Args:
        start: blocks in whose time a program starts and ends.
        slowed: part of its time that a program takes longer for each that runs beside it.
    """
    best, fastest = 1, math.inf
    for splits in range(
        1, min(blocks, most or blocks, max(1, 2 * slots * beside // sequences)) + 1
    ):
        turns, rest = divmod(math.ceil(sequences * splits / slots), beside)
        rounds = [beside] * turns + [rest] * (rest > 0)
        length = math.ceil(blocks / splits)
        time = sum((start + length) * (1 + slowed * (programs - 1)) for programs in rounds)
        if time < fastest:
            best, fastest = splits, time
    return best


def power_of_two(number: int, low: int, high: int) -> int:
    """The power of two from `number` on, within bounds."""
    # Triton's own function is written for kernels: it takes 20 times as long.
    return min(high, max(low, 1 << (number - 1).bit_length()))


def shares(number: int, size: int) -> int:
    """How many times `size` covers a number."""
    return -(-number // size)


def longest(length: int, positions: int, window: int | None) -> int:
    """Slots that a sequence attends to at most."""
    return length if window is None else min(length, window + positions - 1)


def in_rows(mask: Tensor | None) -> tuple[Tensor | None, int]:
    """A mask [b or 1, t] whose slots lie side by side, and the stride from sequence to sequence."""
    if mask is None:
        return None, 0
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask, mask.stride(0) if len(mask) > 1 else 0


def types_of(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Types of tensors that need not be there."""
    return tuple([None if x is None else x.dtype for x in tensors])


def choose_shape(row_bytes: int, query_bytes: int, limit: int) -> tuple[int, int]:
    """One of `SHAPES` for keys and values of `row_bytes` a slot, beside the queries."""
    for block, stages in SHAPES:
        # Blocks of fewer slots than a warp group has rows keep the queries in registers.
        shared = block * stages * row_bytes + (query_bytes if block >= 64 else 0)
        if shared <= limit:
            return block, stages
    return SHAPES[-1]


class RotatedShape(NamedTuple):
    """What programs a case is run by.

    Attributes:
        constants: of `split_kernel`.
        per_program: queries of one.
        tiles: programs that share the queries of a sequence.
        block: slots at a time.
    """

    constants: Constants
    per_program: int
    tiles: int
    block: int


@functools.lru_cache(maxsize=1024)
def rotated_shape(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    positions: int,
    widths: tuple[int, int],
    ranks: tuple[int, int],
    groups: int,
    page: int,
    align: int,
    factors_align: int,
    softmax: tuple[float, float | None, int | None],
    bounds: tuple[torch.dtype | None, ...],
    overlap: bool,
) -> RotatedShape:
    """Of queries in `dtype` and what is cached for them.

    Args:
        widths, ranks: of keys and values.
        align, factors_align: what strides of numbers, and of head factors, are multiples of.
        softmax: scale, cap and window.
        bounds: types of what bounds slots.
    """
    (width_k, width_v), (rank_k, rank_v) = widths, ranks
    chunk_k = width_k // (2 * rank_k) if rank_k > 1 else power_of_two(width_k, 16, 128)
    chunk_v = width_v // rank_v if rank_v > 1 else power_of_two(width_v, 64, 128)
    chunks_k, chunks_v = shares(width_k, chunk_k), shares(width_v, chunk_v)
    padded_k, padded_v, size = chunks_k * chunk_k, chunks_v * chunk_v, dtype.itemsize
    widest = MAX_COLUMNS if (padded_k + padded_v) * size <= 1024 else MAX_COLUMNS // 2
    per_program = power_of_two(heads * positions, 16, widest)
    factors_k, factors_v = (
        power_of_two(rank * groups, 16, 1 << 16) if rank else 0 for rank in ranks
    )
    block, stages = choose_shape(
        (padded_k + padded_v + factors_k + factors_v) * size,
        padded_k * size * per_program,
        shared_bytes(device),
    )
    constants = Constants(
        device,
        {"num_warps": 4, "num_stages": stages},
        (heads, positions, width_k // 8, width_v // 8, *softmax),
        COLUMNS=per_program,
        CHUNK_K=chunk_k,
        CHUNKS_K=chunks_k,
        CHUNK_V=chunk_v,
        CHUNKS_V=chunks_v,
        RANK_K=rank_k,
        RANK_V=rank_v,
        GROUPS=groups,
        FACTORS_K=factors_k,
        FACTORS_V=factors_v,
        FACTORS_ALIGN=factors_align,
        PAGE=page,
        BLOCK=block,
        ALIGN=align,
        MULTIPLE=positions > 1,
        PRECISION="ieee" if dtype == torch.float32 else "tf32",
        STAGES=stages,
        OVERLAP=overlap,
    )
    return RotatedShape(constants, per_program, shares(heads * positions, per_program), block)


def launch_rotated(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    start: Tensor | None,
    end: Tensor | None,
    window: int | None,
    softcap: float | None,
    key_heads: Tensor | None = None,
    value_heads: Tensor | None = None,
    groups: int = 1,
    pages: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`reference.decode_attention`, for widths in multiples of 8 and any strides but the last.

    With head factors of several ranks, the features of a rank (half of them, for keys) are a power
    of two.
    """
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, positions, width_k = query.shape
    length, width_v = values.shape[2:]
    page = 0
    if pages is not None:
        page, length = length, length * pages.shape[1]
    columns, device, dtype = heads * positions, query.device, query.dtype
    strides = (
        *query.stride()[:3],
        *(x.stride(i) for x in (keys, values) for i in (0, 2)),
    )
    mask, mask_stride = in_rows(mask)
    heads_strides = [
        x.stride(i) if x is not None else 0 for x in (key_heads, value_heads) for i in (0, 2)
    ]
    widest = 16 // dtype.itemsize  # loads are of 16 bytes at most
    shape = rotated_shape(
        device,
        dtype,
        heads,
        positions,
        (width_k, width_v),
        (
            0 if key_heads is None else key_heads.shape[-1] // groups,
            0 if value_heads is None else value_heads.shape[-1] // groups,
        ),
        groups,
        page,
        math.gcd(widest, *strides),
        math.gcd(widest, *heads_strides),
        (scale, softcap, window),
        types_of(pages, start, end, mask),
        overlapped(device),
    )
    splits = choose_splits(
        shares(longest(length, positions, window), shape.block),
        batch * shape.tiles,
        multiprocessors(device),
    )
    partial = query.new_empty((batch, splits, columns, width_v), dtype=torch.float32)
    partial_lse = query.new_empty((batch, splits, columns), dtype=torch.float32)
    tensors = (
        query,
        keys,
        values,
        key_heads,
        value_heads,
        partial,
        partial_lse,
        pages,
        start,
        end,
        mask,
    )
    paged = 0 if pages is None else pages.stride(0)
    numbers = paged, mask_stride, *strides, *heads_strides, length, splits
    start_kernel(split_kernel, (splits, batch, shape.tiles), shape.constants, tensors, numbers)
    return launch_join(partial, partial_lse, query.new_empty((batch, heads, positions, width_v)))


@functools.lru_cache(maxsize=256)
def join_constants(
    device: torch.device, dtype: torch.dtype, columns: int, width: int, splits: int, overlap: bool
) -> Constants:
    """Of `join_kernel`, for so many splits at a time."""
    return Constants(
        device,
        options_of(4, overlap),
        (columns, width),
        CHUNK=power_of_two(width, 16, 64),
        SPLITS=splits,
        OVERLAP=overlap,
    )


def launch_join(partial: Tensor, partial_lse: Tensor, output: Tensor) -> Tensor:
    """Fills `output` [b, h, s, w_v] with what splits [b, splits, h * s, w_v] and their log-sum-exps
    sum up to."""
    batch, splits, columns, width_v = partial.shape
    device, at_once = output.device, power_of_two(splits, 1, SPLITS_AT_ONCE)
    shape = output.dtype, columns, width_v
    constants = join_constants(device, *shape, at_once, overlapped(device))
    grid = columns, shares(width_v, constants.named["CHUNK"]), batch
    start_kernel(join_kernel, grid, constants, (partial, partial_lse, output), (splits,))
    return output
