"""Attention of a few query positions over a cache of components, on the best backend there is."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, reference
from .backends import Case, choose_backend


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    start: Tensor | None = None,
    end: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    key_heads: Tensor | None = None,
    value_heads: Tensor | None = None,
    groups: int = 1,
    pages: Tensor | None = None,
) -> Tensor:
    """softmax(scale · query keysᵀ) values, for one head of keys and values that all queries share.

    The last query stands in slot `end − 1`, those before it in the slots before. Nothing is read
    from slots that no query attends to, and nothing waits for the device.

    Args:
        query: in the space of the key components, [b, h, s, w_k].
        keys, values: the cache, [b, 1, t, w_k] and [b, 1, t, w_v]; with any strides but the last.
        scale: of the scores.
        start: first slot in use of each sequence, integers [b]; None for 0.
        end: slots in use of each sequence, those of the queries included, [b]; None for all.
        window: slots that a query attends to at most, its own included.
        softcap: scores x become softcap · tanh(x / softcap).
        mask: slots that may be attended to at all, bool [b or 1, t]; None for all.
        key_heads, value_heads: contextual head factors beside numbers, [b, 1, t, R * groups]; of
            keys alone, or of both. See `reference.decode_attention` for the layout of features.
        groups: key/value heads, for head factors.
        pages: of each sequence in order, integers [b, n], where the cache is a pool of pages:
            [pages, 1, slots of a page, …] instead of [b, 1, t, …].

    Returns: [b, h, s, w_v] in the type of `query`; zeros where nothing is attended to.

    Raises:
        ValueError: values alone have head factors.
        BackendError: the environment asks for a backend that cannot run this.
    """
    output = decode_on_kernel(
        query,
        keys,
        values,
        scale=scale,
        start=start,
        end=end,
        window=window,
        softcap=softcap,
        mask=mask,
        key_heads=key_heads,
        value_heads=value_heads,
        groups=groups,
        pages=pages,
    )
    if output is not None:
        return output
    return reference.decode_attention(
        query,
        keys,
        values,
        scale=scale,
        start=start,
        end=end,
        window=window,
        softcap=softcap,
        mask=mask,
        key_heads=key_heads,
        value_heads=value_heads,
        groups=groups,
        pages=pages,
    )


def decode_on_kernel(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    start: Tensor | None = None,
    end: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    key_heads: Tensor | None = None,
    value_heads: Tensor | None = None,
    groups: int = 1,
    pages: Tensor | None = None,
) -> Tensor | None:
    """`decode_attention` where a kernel runs it, None where only the reference would."""
    factors = key_heads is not None or value_heads is not None
    if factors and key_heads is None:
        raise ValueError("head factors belong to keys, or keys and values")
    backend = choose_backend(
        Case(
            "contextual" if factors else "rotated",
            query.shape[-1],
            values.shape[-1],
            query.dtype,
            query.device,
            (keys.dtype, values.dtype),
            tuple(0 if x is None else x.shape[-1] // groups for x in (key_heads, value_heads)),
            pages is not None,
        )
    )
    if backend == "reference":
        return None
    # As an operator it costs the host as much again; only compilers need one.
    decode_rotated = ops.decode_rotated if torch.compiler.is_compiling() else ops.run_rotated
    return decode_rotated(
        query,
        keys,
        values,
        scale,
        start,
        end,
        window,
        softcap,
        key_heads,
        value_heads,
        groups,
        pages,
        mask,
    )
