"""Attention of a few query positions over coded latent keys, where a kernel runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .backends import Case, choose_backend
from .latent_tables import WORD, LatentTables


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
    layout = tables.layout
    case = Case(
        "latent",
        WORD * layout.key_items,
        WORD * (tables.items.shape[0] - layout.key_items),
        query.dtype,
        query.device,
        paged=pages is not None,
        span=(layout.heads * layout.padded, layout.spans if layout.together else 1),
    )
    if choose_backend(case) == "reference":
        return None
    cached = query, keys, values, cosine, sine
    call = scale, start, end, window, softcap, mask, pages
    if torch.compiler.is_compiling():
        return ops.decode_latent(*cached, list(layout), *tables[1:], *call)
    # As an operator it costs the host as much again; only compilers need one.
    return ops.run_latent(*cached, tables, *call)
