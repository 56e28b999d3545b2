"""How the kernels for latent keys are launched: weights, sums, join."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .latent import latent_weights_kernel
from .latent_sums import latent_join_kernel, latent_sums_kernel
from .latent_tables import CHUNK, PIECE, LatentTables
from .launch import (
    INTERPRETED,
    choose_splits,
    in_rows,
    longest,
    multiprocessors,
    overlapped,
    power_of_two,
)

MAX_COLUMNS = 32  # queries of a program, all heads and positions
SPLITS_AT_ONCE = 128  # that the joining kernel reads
# Slots of a block and warps: the first that gives every multiprocessor a program, or the last.
SHAPES = ((128, 8), (64, 4))
STAGES = 2  # chunks of weights in flight
SUMS_AT_ONCE = 4  # programs of sums that a multiprocessor runs


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
    columns, places = heads * positions, len(tables.centre)
    padded_columns = -(-columns // 16) * 16
    mask, mask_stride = in_rows(mask)
    options = overlapped(query.device)
    processors = multiprocessors(query.device)
    exact = query.dtype == torch.float32
    terms = 4 if layout.coded else 2
    if sine.stride() != cosine.stride():
        cosine, sine = cosine.contiguous(), sine.contiguous()

    per_span = layout.heads * (heads // layout.groups) * positions
    per_program = power_of_two(per_span, 16, MAX_COLUMNS)
    tiles = triton.cdiv(per_span, per_program)
    attended = longest(length, positions, window)
    programs = batch * layout.spans * tiles
    fitting = [x for x in SHAPES if triton.cdiv(attended, x[0]) * programs >= processors]
    block, warps = fitting[0] if fitting else SHAPES[-1]
    blocks = triton.cdiv(length, block)
    weights = query.new_empty(
        (batch, length, padded_columns), dtype=torch.float32 if exact else torch.float16
    )
    block_terms = query.new_empty((batch, blocks, terms, padded_columns), dtype=torch.float32)
    bounds = (pages, start, end, mask, 0 if pages is None else pages.stride(0), mask_stride)
    strides = tuple(x.stride(i) for x in (keys, values) for i in (0, 2))
    octaves = (float(layout.octave_k), float(layout.octave_v))
    headers = (layout.header_k, layout.header_v)
    kind: dict[str, Any] = {
        "CODED": bool(layout.coded),
        "PARTS": layout.parts,
        "PAGE": page,
        "BLOCK": block,
        "PRECISION": "ieee" if exact else "tf32",
    }
    latent_weights_kernel[(blocks, batch, layout.spans * tiles)](
        query,
        keys,
        values,
        tables.fields,
        tables.centre,
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
        cosine.stride(0) if len(cosine) > 1 else 0,
        *cosine.stride()[1:],
        heads,
        positions,
        length,
        places,
        padded_columns,
        scale,
        softcap,
        window,
        *octaves,
        *headers,
        tables.epsilon,
        GROUPS=layout.groups,
        BLOCKS=layout.blocks,
        PAIRS=layout.pairs,
        HEADS=layout.heads,
        SPANS=layout.spans,
        PADDED=layout.padded,
        TOGETHER=bool(layout.together),
        COLUMNS=per_program,
        TILES=tiles,
        CHUNK=CHUNK,
        MULTIPLE=positions > 1,
        # Squares of fp16 numbers do not fit fp16.
        SQUARES=tl.float32 if exact or INTERPRETED else tl.bfloat16,
        STAGES=STAGES,
        OVERLAP=options["OVERLAP"],
        num_warps=warps,
        num_stages=STAGES,
        **kind,
    )
    pieces = places // PIECE - layout.first_piece
    per_program = power_of_two(columns, 16, MAX_COLUMNS)
    tiles = triton.cdiv(columns, per_program)
    splits = choose_splits(
        triton.cdiv(attended, block), batch * tiles * pieces, SUMS_AT_ONCE * processors
    )
    partial = query.new_empty((batch, splits, columns, places), dtype=torch.float32)
    partial_terms = query.new_empty((batch, splits, terms, columns), dtype=torch.float32)
    latent_sums_kernel[(pieces, splits, batch * tiles)](
        keys,
        values,
        tables.fields,
        tables.centre,
        weights,
        block_terms,
        partial,
        partial_terms,
        *bounds,
        *strides,
        columns,
        positions,
        length,
        places,
        layout.key_places,
        layout.first_piece,
        padded_columns,
        window,
        *octaves,
        *headers,
        splits,
        blocks,
        COLUMNS=per_program,
        TILES=tiles,
        PIECE=PIECE,
        num_warps=warps,
        **kind,
        **options,
    )
    output = query.new_empty((batch, heads, positions, layout.features))
    chunk = power_of_two(layout.features, 16, 64)
    latent_join_kernel[(columns, triton.cdiv(layout.features, chunk), batch)](
        partial,
        partial_terms,
        output,
        tables.place_of,
        tables.step,
        columns,
        places,
        layout.features,
        splits,
        TERMS=terms,
        CHUNK=chunk,
        SPLITS=power_of_two(splits, 1, SPLITS_AT_ONCE),
        num_warps=4,
        **options,
    )
    return output
