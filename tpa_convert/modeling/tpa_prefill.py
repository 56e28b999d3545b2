"""Attention functions on keys and values rebuilt from what is cached, some heads at a time.

Heads do not know of each other, so that nothing has to be merged, and any attention function will
do: of a long context, keys and values of a few heads are all that memory holds at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .tpa_decode import masked_softmax
from .tpa_gauges import Heads
from .tpa_kernels import of_one_width

REBUILT_BYTES = 1 << 28  # of keys and values side by side, unless a single head has more


def rebuilt_attention(
    attention: Any,
    interface: Callable[..., Any],
    query: torch.Tensor,
    packed: torch.Tensor,
    expand: Callable[[Heads], tuple[torch.Tensor, torch.Tensor]],
    attention_mask: torch.Tensor | None,
    one_width: bool,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What an attention function of transformers gives, [b, s, h, ...], and its weights if it gives
    them.

    Args:
        attention: the `TPAAttention` that calls.
        query: rotated, [b, h, s, d].
        packed: features of keys or what is cached, [b, 1, t, ...].
        expand: gives keys and values of some heads.
        one_width: whether the function wants keys as wide as values.
        settings: of the attention function.
    """
    count = attention.expanded_heads
    found = []
    for heads in runs_of_heads(attention, query, packed):
        of_run = query
        if heads is not None:
            shared = attention.num_key_value_groups
            of_run = query[:, heads.start * shared : heads.stop * shared]
            count = heads.stop - heads.start
        key, value = expand(heads)
        if one_width:
            of_run, key, value = of_one_width(of_run, key, value)
        key, value = (
            x if x.shape[1] == count else x.expand(-1, count, -1, -1) for x in (key, value)
        )
        found.append(interface(attention, of_run, key, value, attention_mask, **settings))
    if len(found) == 1:
        return found[0]
    outputs, weights = zip(*found, strict=True)
    return torch.cat(outputs, 2), None if weights[0] is None else torch.cat(weights, 1)


def runs_of_heads(attention: Any, query: torch.Tensor, packed: torch.Tensor) -> list[Heads]:
    """Key/value heads whose keys and values are rebuilt together; [None] for all."""
    count = attention.expanded_heads
    batch, _, slots, _ = packed.shape
    at_once = max(1, REBUILT_BYTES // (batch * slots * 2 * query.shape[-1] * query.element_size()))
    if at_once >= count or torch.compiler.is_compiling():
        return [None]
    norm = attention.keys.norm
    if norm is not None and norm.all_heads and attention.shape.latent_keys:
        return [None]
    return [slice(first, min(first + at_once, count)) for first in range(0, count, at_once)]


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain products, as transformers' own: output [b, s, h, d] and weights."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = masked_softmax(scores, attention_mask)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights
