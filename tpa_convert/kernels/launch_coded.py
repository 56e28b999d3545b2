"""How the Triton kernels for coded rows are launched: in one pass where sums over values fit."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .coded import coded_kernel, fold_kernel, join_coded_kernel
from .launch import (
    INTERPRETED,
    choose_splits,
    in_rows,
    longest,
    multiprocessors,
    overlapped,
    power_of_two,
)
from .places import Places
from .wide import values_kernel, weights_kernel

MAX_COLUMNS = 32  # queries of a program, all heads and positions
WEIGHTS_BLOCK = 128  # slots
ONE_PASS_SUMS = 256 * 16  # value places times columns that one program sums
SPLITS_AT_ONCE = 128  # that the joining kernel reads


def tiers(places: Places) -> list[list[int]]:
    """Bits, first word, words and words of a chunk, of each tier."""
    flat = places.layout[3:]
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]


def tier_constants(places: Places) -> dict[str, tuple[int, ...]]:
    """Of the kernels in `wide.py`."""
    return dict(
        zip(("BITS", "WORD", "WORDS", "SIZE"), zip(*tiers(places), strict=True), strict=True)
    )


def chunk_constants(places: Places, part: str) -> dict[str, tuple[int, ...]]:
    """Of the kernel in `coded.py`: every chunk of every tier."""
    chunks = [
        (bits, word + first, size, min(size, words - first))
        for bits, word, words, size in tiers(places)
        for first in range(0, words, size)
    ]
    names = (f"{name}_{part}" for name in ("BITS", "WORD", "SIZE", "USED"))
    return dict(zip(names, zip(*chunks, strict=True), strict=True))


def header_constants(places: Places, part: str) -> dict[str, int]:
    """Where the header is, in words of 16 bits and bits from an even one of them on."""
    header, classes = places.layout[:2]
    return {
        f"HEADER_{part}": header // 4 * 2,
        f"SHIFT_{part}": header % 4 * 8,
        f"CLASSES_{part}": classes,
    }


def launch_coded(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_places: Places,
    value_places: Places,
    scale: float,
    start: Tensor | None,
    end: Tensor | None,
    window: int | None,
    softcap: float | None,
    mask: Tensor | None = None,
) -> Tensor:
    """`reference.decode_attention` over uint8 rows whose strides are multiples of 4 bytes."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, heads, positions, width_k = query.shape
    length, width_v = keys.shape[2], value_places.mean.shape[1]
    columns = heads * positions
    places_k, places_v = len(key_places.gain), len(value_places.gain)
    classes_k, classes_v = key_places.layout[1], value_places.layout[1]
    mask, mask_stride = in_rows(mask)
    options = overlapped(query.device)

    folded = query.new_empty((batch, columns, places_k), dtype=torch.float16)
    terms = query.new_empty((batch, 2 + classes_k, columns), dtype=torch.float32)
    fold_kernel[(columns, batch)](
        query,
        folded,
        terms,
        key_places.component_of,
        key_places.gain,
        key_places.mean,
        key_places.centre,
        *query.stride()[:3],
        positions,
        places_k,
        width_k,
        CLASSES=classes_k,
        CHUNK=power_of_two(max(places_k, width_k), 64, 1024),
        OVERLAP=options["OVERLAP"],
        num_warps=4,
    )
    keys, values = keys.view(torch.int16), values.view(torch.int16)
    strides = tuple(x.stride(i) for x in (keys, values) for i in (0, 2))
    per_program = power_of_two(columns, 16, MAX_COLUMNS)
    shared: dict[str, Any] = {
        "COLUMNS": per_program,
        "ALIGN": math.gcd(8, *strides),
        "ASSEMBLY": not INTERPRETED,
        "num_warps": 4,
        **options,
    }
    tiles = triton.cdiv(columns, per_program)
    blocks = triton.cdiv(length, WEIGHTS_BLOCK)
    attended = triton.cdiv(longest(length, positions, window), WEIGHTS_BLOCK)
    slots = 2 * multiprocessors(query.device)
    one_pass = places_v * per_program <= ONE_PASS_SUMS
    pieces = 1 if one_pass else sum(-(-words // size) for _, _, words, size in tiers(value_places))
    splits = choose_splits(attended, batch * tiles * pieces, slots)
    partial = query.new_empty((batch, splits, columns, places_v), dtype=torch.float32)
    partial_terms = query.new_empty((batch, splits, 2 + classes_v, columns), dtype=torch.float32)
    octaves = (float(key_places.layout[2]), float(value_places.layout[2]))
    headers = header_constants(key_places, "K") | header_constants(value_places, "V")
    if one_pass:
        coded_kernel[(splits, batch, tiles)](
            folded,
            terms,
            keys,
            values,
            partial,
            partial_terms,
            start,
            end,
            mask,
            mask_stride,
            *octaves,
            *strides,
            columns,
            positions,
            length,
            places_k,
            places_v,
            scale,
            softcap,
            window,
            splits,
            **headers,
            **chunk_constants(key_places, "K"),
            **chunk_constants(value_places, "V"),
            BLOCK=WEIGHTS_BLOCK,
            MULTIPLE=positions > 1,
            STAGES=3,
            **shared,
        )
    else:
        weights = query.new_empty((batch, length, tiles * per_program), dtype=torch.float16)
        block_terms = query.new_empty(
            (batch, blocks, 1 + classes_v, tiles * per_program), dtype=torch.float32
        )
        weights_kernel[(blocks, batch, tiles)](
            folded,
            terms,
            keys,
            values,
            weights,
            block_terms,
            start,
            end,
            mask,
            mask_stride,
            *octaves,
            *strides,
            columns,
            positions,
            length,
            places_k,
            scale,
            softcap,
            window,
            **headers,
            **tier_constants(key_places),
            BLOCK=WEIGHTS_BLOCK,
            MULTIPLE=positions > 1,
            STAGES=4,
            **shared,
        )
        values_kernel[(pieces, splits, batch * tiles)](
            values,
            weights,
            block_terms,
            partial,
            partial_terms,
            start,
            end,
            *strides[2:],
            columns,
            positions,
            length,
            places_v,
            window,
            splits,
            blocks,
            CLASSES=classes_v,
            **tier_constants(value_places),
            TILES=tiles,
            SCORE_BLOCK=WEIGHTS_BLOCK,
            BLOCK=64,
            STAGES=3,
            **shared,
        )
    output = query.new_empty((batch, heads, positions, width_v))
    chunk = power_of_two(width_v, 16, 64 if splits <= 32 else 32)  # registers are finite
    join_coded_kernel[(columns, triton.cdiv(width_v, chunk), batch)](
        partial,
        partial_terms,
        output,
        value_places.place_of,
        value_places.gain,
        value_places.mean,
        value_places.centre,
        columns,
        places_v,
        width_v,
        splits,
        CLASSES=classes_v,
        PARTS=len(value_places.place_of),
        CHUNK=chunk,
        SPLITS=power_of_two(splits, 1, SPLITS_AT_ONCE),
        num_warps=4,
        **options,
    )
    return output
