"""How the kernels for latent keys are launched: weights, sums, join."""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch_hopper as hopper
from .latent_places import WORD
from .latent_tables import LatentTables, OutputMap
from .launch import in_rows, longest, shares, types_of
from .launch_latent_shape import SHAPES, SHORTEST, latent_shape
from .launch_products import map_launches
from .start import Calls, laid_out

MOST_LAUNCHES = 16  # that are kept of a layer: caches that take turns
# What kernels call their arguments: tensors of the tables, tensors and numbers of a call.
OF_KEYS = "chunks", "behind", "weight", "whole", "unit", "offset", "norm"
TABLES = *OF_KEYS, "items", "place_of", "step"
BOUNDS = "pages", "start", "end", "mask"
MAP = "gauge", "gauge_offset", "projection", "projection_bias"
TENSORS = "query", "keys", "values", "cosine", "sine", *BOUNDS, "output", *MAP
STRIDES = "pages_stride_b", "mask_stride_b", "key_stride_b", "value_stride_b"
NUMBERS = *STRIDES, "table_rows", "length"
NO_MAP = None, None, None, None


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
    output_map: OutputMap | None = None,
) -> Tensor:
    """`decode_latent.latent_on_kernel`, for any strides but the last of queries, keys and
    values; with an output map `decode_latent.attend_on_kernel`."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    length, page, pages_stride = keys.shape[2], 0, 0
    if pages is not None:
        page, length, pages_stride = length, length * pages.shape[1], pages.stride(0)
    key_stride_b, _, key_stride_t, _ = keys.stride()
    value_stride_b, _, value_stride_t, _ = values.stride()
    if (key_stride_t | value_stride_t | key_stride_b | value_stride_b) % WORD:
        raise ValueError(f"rows of a coded cache must begin at multiples of {WORD} bytes")
    mask, mask_stride = in_rows(mask)
    table_stride_b, table_stride_t, table_stride_p = cosine.stride()
    table_rows = table_stride_b // max(1, table_stride_t)  # between sequences
    if sine.stride() != cosine.stride() or table_rows * table_stride_t != table_stride_b:
        cosine, sine = cosine.contiguous(), sine.contiguous()
        _, table_stride_t, table_stride_p = cosine.stride()
        table_rows = cosine.shape[1]
    kind: tuple[Any, ...] = (
        (cosine.dtype, *types_of(pages, start, end, mask)),
        query.shape,
        (
            *query.stride()[:3],
            key_stride_t // WORD,
            value_stride_t // WORD,
            table_stride_t,
            table_stride_p,
        ),
        (shares(length, SHORTEST), page),
        (scale, softcap, window),
        by_group,
        hopper.rows_fit(cosine, sine),
        None if output_map is None else output_map.kind(),
    )
    of_tables = tables[2:-1]
    launch = tables.launches.get(kind)
    if launch is None or not all(map(is_, launch.tables, of_tables)):
        launch = latent_launch(query, tables, *kind)
        if len(tables.launches) >= MOST_LAUNCHES:
            tables.launches.clear()
        tables.launches[kind] = launch
    scratch = query.new_empty(launch.scratch, dtype=torch.uint8)
    output = query.new_empty(launch.output)
    last = output_map or NO_MAP
    tensors = query, keys, values, cosine, sine, pages, start, end, mask, output, *last
    numbers = (
        pages_stride,
        mask_stride,
        key_stride_b // WORD,
        value_stride_b // WORD,
        table_rows if len(cosine) > 1 else 0,
        length,
    )
    launch.calls.start(scratch, tensors, numbers)
    return output


class LatentLaunch(NamedTuple):
    """All that calls of one kind have in common.

    Attributes:
        tables: tensors of the tables that it was made for.
        calls: of the kernels of weights, of sums, and of what joins them; and of those of products
            with what comes out.
        scratch: bytes of what one kernel writes and another reads.
        output: size.
    """

    tables: tuple[Tensor | None, ...]
    calls: Calls
    scratch: int
    output: tuple[int, ...]


def latent_launch(
    query: Tensor,
    tables: LatentTables,
    types: tuple[torch.dtype | None, ...],
    queries: tuple[int, int, int, int],
    strides: tuple[int, ...],
    lengths: tuple[int, int],
    softmax: tuple[float, float | None, int | None],
    by_group: bool,
    rows_fit: bool,
    mapped: tuple[int, bool, bool] | None,
) -> LatentLaunch:
    """See `latent_shape`; of `types` and `lengths` those that do not follow from other arguments
    are given."""
    (cosines, *bounds), (length, page) = types, lengths
    attended = longest(length * SHORTEST, queries[2], softmax[-1])
    shape = latent_shape(
        tables.layout,
        tables.epsilon,
        query.device,
        (query.dtype, cosines, *types_of(tables.norm), *bounds),
        queries,
        strides,
        (length, shares(attended, SHORTEST), page),
        softmax,
        SHAPES,
        by_group,
        rows_fit,
        tables.whole is not None,
    )
    others: list[dict[str, str]] = [{"weights_out": "weights"}, {}, {}]
    if shape.whole:
        others[0]["weight"] = "whole"
    kernels = list(zip(shape.kernels, shape.grids, shape.constants, others, strict=True))
    fixed = {name: getattr(tables, name) for name in TABLES}
    fixed |= {"splits": shape.splits, "blocks": shape.blocks}
    parts, scratch, output = shape.parts, shape.scratch, shape.output
    if mapped is not None:
        others[-1]["output"] = "features"
        size, *biased = mapped
        more = map_launches(query, output, size, *biased)
        kernels += more.kernels
        added, scratch = laid_out(more.parts, scratch)
        parts, output = parts | added, (len(query), 1, size)
        fixed |= more.numbers
    viewed = {"keys": torch.int32, "values": torch.int32}
    calls = Calls(kernels, TENSORS, parts, fixed, NUMBERS, viewed)
    return LatentLaunch(tables[2:-1], calls, scratch, output)
