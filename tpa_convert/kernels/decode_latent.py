"""Attention of a few query positions over coded latent keys, where a kernel runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import Case, choose_backend
from .latent_places import WORD
from .latent_tables import LatentTables, OutputMap


def decode_latent(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    tables: LatentTables,
    *,
    scale: float,
    start: Tensor | None = None,
    end: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    pages: Tensor | None = None,
) -> Tensor | None:
    """softmax(scale · query keysᵀ) features, where a kernel runs it; None where none does.

    Keys are rebuilt and rotated where they are used, and nothing of their size is made. What
    stands in slots that no query attends to does not matter, and nothing waits for the device.

    Args:
        query: rotated, real parts of all pairs first, [b, h, s, d].
        keys, values: the cache, uint8 rows [b, 1, t, bytes] that begin at whole words of four
            bytes, with any strides but the last.
        cosine, sine: of the position of each slot, [b or 1, t, d / 2].
        tables: of the layer, in the type of `query`.
        mask: slots that may be attended to at all, bool [b or 1, t], or what is added to their
            scores, with the lowest number of its type for never; None for all.
        scale, start, end, window, softcap, pages: see `decode.decode_attention`. With pages,
            `cosine` and `sine` are still those of the slots in order.

    Returns: features as the tables order them, [b, h, s, n] in the type of `query`, n being a
        multiple of 8 with zeros behind; zeros where nothing is attended to.

    Raises:
        BackendError: the environment asks for a backend that cannot run this.
    """
    if not runs_latent(tables, query.dtype, query.device):
        return None
    cached = query, keys, values, cosine, sine
    call = scale, start, end, window, softcap, mask, pages, False
    return latent_on_kernel(*cached, tables, *call)


def runs_latent(tables: LatentTables, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel runs a layer of these tables for queries of this type and place.

    Raises:
        BackendError: the environment asks for a backend that cannot.
    """
    layout = tables.layout
    case = Case(
        "latent",
        WORD * layout.key_items,
        WORD * (layout.items - layout.key_items),
        dtype,
        device,
        span=(layout.heads * layout.padded, layout.spans if layout.together else 1),
    )
    return choose_backend(case) != "reference"


def latent_on_kernel(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    tables: LatentTables,
    *call: Any,
) -> Tensor:
    """`decode_latent` where `runs_latent` says yes, without asking again.

    Args:
        call: scale, start, end, window, softcap, mask, pages, and whether what belongs to a
            key/value head stands together.

    Returns: [b, h, s, n], or [j, b · h / j · s, n] for j key/value heads.
    """
    cached = query, keys, values, cosine, sine
    if torch.compiler.is_compiling():
        return ops.decode_latent(*cached, list(tables.layout), *tables[1:-1], *call)
    # As an operator it costs the host as much again; only compilers need one.
    return ops.run_latent(*cached, tables, *call)


def attend_on_kernel(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    tables: LatentTables,
    scale: float,
    softcap: float | None,
    mask: Tensor | None,
    output_map: OutputMap,
) -> Tensor:
    """The output of a layer [b, 1, D] for one query position of at most `tokens.MOST_TOKENS`
    sequences, where `runs_latent` says yes: heads are made of features, and projected, in products
    that add up in fp32 and are rounded once each. No operator for compilers, which do without."""
    bounds = None, None, None  # start, end and window: the mask says all
    call = scale, *bounds, softcap, mask, None, True, output_map
    return ops.run_latent(query, keys, values, cosine, sine, tables, *call)
