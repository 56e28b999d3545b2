"""Decoding attention over what is cached, in plain PyTorch: the truth that kernels are tested on.

It computes in the type of the queries, fp64 included, and reads only slots that are attended to:
whatever stands in the others, NaN too, leaves no trace.

Shape suffixes:
    b  batch                          t  slots of the cache
    h  query heads                    w_k, w_v  components of keys and of values
    s  query positions
"""

from __future__ import annotations

import torch
from torch import Tensor


def attended_slots(
    slots: int,
    positions: int,
    start: Tensor | None,
    end: Tensor | None,
    window: int | None,
    device: torch.device,
    mask: Tensor | None = None,
) -> Tensor:
    """Which slots each query position attends to, boolean [b or 1, s, t].

    The last of the queries stands in slot `end - 1`, those before it in the slots before; each
    attends to slots from `start` to its own, within the last `window` of them if that is given.

    Args:
        start: first slot in use of each sequence, integers [b]; None for 0.
        end: slots in use of each sequence, those of the queries included, [b]; None for all.
        mask: which slots may be attended to at all, bool [b or 1, t]; None for all.
    """
    slot = torch.arange(slots, device=device)
    end = torch.full((1,), slots, device=device) if end is None else end
    own = end[:, None] - positions + torch.arange(positions, device=device)  # [b, s]
    attended = slot <= own[..., None]
    if start is not None:
        attended = attended & (slot >= start[:, None, None])
    if window is not None:
        attended = attended & (slot > own[..., None] - window)
    if mask is not None:
        attended = attended & mask[:, None]
    return attended


def _in_order(pool: Tensor, pages: Tensor) -> Tensor:
    """Pages [p, 1, slots, w] of each sequence one after another, [b, 1, t, w]."""
    return pool[:, 0][pages.clamp(0, len(pool) - 1)].flatten(1, 2)[:, None]


def _times_factors(features: Tensor, factors: Tensor, groups: int, parts: int) -> Tensor:
    """Features [b, 1, t, parts * R * n] times factors [b, 1, t, R * groups]: [b, groups, t, …]."""
    factors = factors[:, 0].to(features.dtype).unflatten(-1, (-1, groups))
    features = features[:, 0].unflatten(-1, (parts, factors.shape[2], -1))
    return torch.einsum("btrj,btcrn->bjtcrn", factors, features).flatten(3)


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
    key_heads: Tensor | None = None,
    value_heads: Tensor | None = None,
    groups: int = 1,
    pages: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale · query keysᵀ) values, for one head of keys and values that all queries share.

    With contextual head factors, key/value head j has the keys a_{r,j} b_r of all ranks r, laid out
    [2, R, pairs] as real and imaginary parts, and the values a_{r,j} b_r, laid out [R, features].

    Args:
        query: in the space of the key components, [b, h, s, w_k].
        keys, values: [b, 1, t, w_k] and [b, 1, t, w_v].
        key_heads, value_heads: head factors [b, 1, t, R * groups], rank by rank, each or None.
        groups: key/value heads.
        pages: of each sequence in order, integers [b, n]; what is cached is then a pool of pages,
            [pages, 1, slots of a page, w]. Pages without slots in use may be anything.
        scale: of the scores.
        start, end, window, mask: see `attended_slots`.
        softcap: scores x become softcap · tanh(x / softcap).

    Returns: [b, h, s, w_v] in the type of `query`; zeros where nothing is attended to.
    """
    if pages is not None:
        keys, values = _in_order(keys, pages), _in_order(values, pages)
        key_heads = None if key_heads is None else _in_order(key_heads, pages)
        value_heads = None if value_heads is None else _in_order(value_heads, pages)
    attended = attended_slots(
        keys.shape[2], query.shape[2], start, end, window, query.device, mask
    )[:, None]  # [b, 1, s, t]
    read = attended.any(2)[..., None]  # [b, 1, t, 1]
    keys = torch.where(read, keys, 0).to(query.dtype)
    values = torch.where(read, values, 0).to(query.dtype)
    shared = query.shape[1] // groups
    if key_heads is not None:
        keys = _times_factors(keys, torch.where(read, key_heads, 0), groups, 2)
        keys = keys.repeat_interleave(shared, 1)
    if value_heads is not None:
        values = _times_factors(values, torch.where(read, value_heads, 0), groups, 1)
        values = values.repeat_interleave(shared, 1)
    scores = query @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~attended, -torch.inf)
    highest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    return weights @ values / torch.where(total == 0, 1, total)
