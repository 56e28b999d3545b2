"""How the kernel for latent keys is launched.

No model calls it yet. Its shape is the only one that Triton 3.6 compiled to a right program on an
H100: with blocks of 64 slots, or one stage, programs read beyond their shared memory.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .latent import latent_kernel
from .latent_reference import LatentKeys
from .launch import (
    choose_splits,
    in_rows,
    launch_join,
    longest,
    multiprocessors,
    overlapped,
    power_of_two,
)

MAX_COLUMNS = 32  # queries of a program, all heads and positions
KEYS = 128  # numbers of keys, of all heads made at a time
BLOCK, STAGES, WARPS = 128, 2, 8


def launch_latent(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    latent: LatentKeys,
    scale: float,
    start: Tensor | None,
    end: Tensor | None,
    window: int | None,
    softcap: float | None,
    mask: Tensor | None = None,
) -> Tensor:
    """`latent_reference.decode_latent`, for widths in multiples of 8 and any strides but the
    last."""
    if query.is_cuda and query.element_size() > 2:
        raise ValueError("no kernel for latent keys in fp32: its blocks do not fit")
    batch, heads, positions, head_dim = query.shape
    length, width_v = values.shape[2:]
    width_k, pairs = keys.shape[-1], head_dim // 2
    padded = power_of_two(pairs, 8, 1 << 16)
    query = torch.nn.functional.pad(query.unflatten(-1, (2, -1)), (0, padded - pairs))
    query = query.mT.flatten(-2)  # the two parts of each pair side by side
    groups = len(latent.weight)
    joint = 1
    while latent.unscale is None and groups % (2 * joint) == 0 and 4 * joint * padded <= KEYS:
        joint *= 2
    columns = heads * positions
    per_program = power_of_two(columns, 16, MAX_COLUMNS)
    tiles = triton.cdiv(columns, per_program)
    chunk_k = power_of_two(width_k, 16, 128)
    chunk_v = power_of_two(width_v, 64, 128)
    splits = choose_splits(
        triton.cdiv(longest(length, positions, window), BLOCK),
        batch * tiles,
        multiprocessors(query.device),
    )
    partial = query.new_empty((batch, splits, columns, width_v), dtype=torch.float32)
    partial_lse = query.new_empty((batch, splits, columns), dtype=torch.float32)
    mask, mask_stride = in_rows(mask)
    weight, offset, cosine, sine = (x.contiguous() for x in latent[:4])
    strides = (*query.stride()[:3], *(x.stride(i) for x in (keys, values) for i in (0, 2)))
    options = overlapped(query.device)
    latent_kernel[(splits, batch, tiles)](
        query,
        keys,
        values,
        weight,
        offset,
        cosine,
        sine,
        latent.unscale,
        latent.gain,
        partial,
        partial_lse,
        start,
        end,
        mask,
        mask_stride,
        *strides,
        cosine.stride(0) if len(cosine) > 1 else 0,
        heads,
        positions,
        length,
        pairs,
        width_k // 8,
        width_v // 8,
        scale,
        softcap,
        window,
        latent.epsilon,
        splits,
        GROUPS=groups,
        COLUMNS=per_program,
        PAIRS=padded,
        JOINT=joint,
        CHUNK_K=chunk_k,
        CHUNKS_K=triton.cdiv(width_k, chunk_k),
        CHUNK_V=chunk_v,
        CHUNKS_V=triton.cdiv(width_v, chunk_v),
        BLOCK=BLOCK,
        ALIGN=math.gcd(16 // query.element_size(), *strides),
        MULTIPLE=positions > 1,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        STAGES=STAGES,
        OVERLAP=options["OVERLAP"],
        num_warps=WARPS,
    )
    return launch_join(partial, partial_lse, query.new_empty((batch, heads, positions, width_v)))
