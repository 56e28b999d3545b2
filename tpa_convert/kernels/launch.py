"""How the Triton kernels for numbers are launched, and what all launches share."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from .split_kv import join_kernel, split_kernel

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
def shared_bytes(device: torch.device) -> int:
    """Shared memory that blocks and queries of one program may take."""
    if device.type != "cuda":
        return 1 << 30
    properties: Any = torch.cuda.get_device_properties(device)  # stubs lack the limit
    return properties.shared_memory_per_block_optin - COMPILERS_SHARED_BYTES


@functools.cache
def overlapped(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that may start while the one before it ends (Hopper on)."""
    if INTERPRETED or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@functools.lru_cache(maxsize=4096)
def choose_splits(blocks: int, sequences: int, slots: int) -> int:
    """Splits of each sequence's `blocks` that finish first when `slots` programs run at a time."""
    best, fastest = 1, math.inf
    for splits in range(1, min(blocks, max(1, 2 * slots // sequences)) + 1):
        waves = math.ceil(sequences * splits / slots)
        time = waves * (math.ceil(blocks / splits) + 1)  # each program starts and ends once
        if time < fastest:
            best, fastest = splits, time
    return best


def power_of_two(number: int, low: int, high: int) -> int:
    """The power of two from `number` on, within bounds."""
    return min(high, max(low, triton.next_power_of_2(number)))


def longest(length: int, positions: int, window: int | None) -> int:
    """Slots that a sequence attends to at most."""
    return length if window is None else min(length, window + positions - 1)


def in_rows(mask: Tensor | None) -> tuple[Tensor | None, int]:
    """A mask [b or 1, t] whose slots lie side by side, and the stride from sequence to sequence."""
    if mask is None:
        return None, 0
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask, mask.stride(0) if len(mask) > 1 else 0


def choose_shape(row_bytes: int, query_bytes: int, limit: int) -> tuple[int, int]:
    """One of `SHAPES` for keys and values of `row_bytes` a slot, beside the queries."""
    for block, stages in SHAPES:
        # Blocks of fewer slots than a warp group has rows keep the queries in registers.
        shared = block * stages * row_bytes + (query_bytes if block >= 64 else 0)
        if shared <= limit:
            return block, stages
    return SHAPES[-1]


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
    columns = heads * positions
    chunk_k = power_of_two(width_k, 16, 128)
    chunk_v = power_of_two(width_v, 64, 128)
    rank_k = rank_v = 0
    if key_heads is not None:
        rank_k = key_heads.shape[-1] // groups
        chunk_k = width_k // (2 * rank_k) if rank_k > 1 else chunk_k
    if value_heads is not None:
        rank_v = value_heads.shape[-1] // groups
        chunk_v = width_v // rank_v if rank_v > 1 else chunk_v
    padded_k = triton.cdiv(width_k, chunk_k) * chunk_k
    padded_v = triton.cdiv(width_v, chunk_v) * chunk_v
    size = query.element_size()
    widest = MAX_COLUMNS if (padded_k + padded_v) * size <= 1024 else MAX_COLUMNS // 2
    per_program = power_of_two(columns, 16, widest)
    tiles = triton.cdiv(columns, per_program)
    factors_k, factors_v = (
        power_of_two(rank * groups, 16, 1 << 16) if rank else 0 for rank in (rank_k, rank_v)
    )
    block, stages = choose_shape(
        (padded_k + padded_v + factors_k + factors_v) * size,
        padded_k * size * per_program,
        shared_bytes(query.device),
    )
    splits = choose_splits(
        triton.cdiv(longest(length, positions, window), block),
        batch * tiles,
        multiprocessors(query.device),
    )
    partial = query.new_empty((batch, splits, columns, width_v), dtype=torch.float32)
    partial_lse = query.new_empty((batch, splits, columns), dtype=torch.float32)
    strides = (
        *query.stride()[:3],
        *(x.stride(i) for x in (keys, values) for i in (0, 2)),
    )
    mask, mask_stride = in_rows(mask)
    factor_strides = [
        x.stride(i) if x is not None else 0 for x in (key_heads, value_heads) for i in (0, 2)
    ]
    options = overlapped(query.device)
    split_kernel[(splits, batch, tiles)](
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
        pages.stride(0) if pages is not None else 0,
        mask_stride,
        *strides,
        *factor_strides,
        heads,
        positions,
        length,
        width_k // 8,
        width_v // 8,
        scale,
        softcap,
        window,
        splits,
        COLUMNS=per_program,
        CHUNK_K=chunk_k,
        CHUNKS_K=triton.cdiv(width_k, chunk_k),
        CHUNK_V=chunk_v,
        CHUNKS_V=triton.cdiv(width_v, chunk_v),
        RANK_K=rank_k,
        RANK_V=rank_v,
        GROUPS=groups,
        FACTORS_K=factors_k,
        FACTORS_V=factors_v,
        FACTORS_ALIGN=math.gcd(16 // size, *factor_strides),
        PAGE=page,
        BLOCK=block,
        ALIGN=math.gcd(16 // size, *strides),  # 16 bytes are the widest loads
        MULTIPLE=positions > 1,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        STAGES=stages,
        OVERLAP=options["OVERLAP"],
        num_warps=4,
        num_stages=stages,
    )
    return launch_join(partial, partial_lse, query.new_empty((batch, heads, positions, width_v)))


def launch_join(partial: Tensor, partial_lse: Tensor, output: Tensor) -> Tensor:
    """Fills `output` [b, h, s, w_v] with what splits [b, splits, h * s, w_v] and their log-sum-exps
    sum up to."""
    batch, splits, columns, width_v = partial.shape
    chunk = power_of_two(width_v, 16, 64)
    join_kernel[(columns, triton.cdiv(width_v, chunk), batch)](
        partial,
        partial_lse,
        output,
        columns,
        width_v,
        splits,
        CHUNK=chunk,
        SPLITS=power_of_two(splits, 1, SPLITS_AT_ONCE),
        num_warps=4,
        **overlapped(output.device),
    )
    return output
