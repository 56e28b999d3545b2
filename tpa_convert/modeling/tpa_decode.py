"""Attention of one query position on a packed cache; see `tpa_keys` for letters.

On the kernels of tpa-convert where they are found and can run a case, in PyTorch otherwise.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .tpa_kernels import decode_components
from .tpa_keys import RotatedKeys
from .tpa_values import StaticValues


def decode_rotated(
    query: Tensor,
    packed_key: Tensor,
    packed_value: Tensor,
    attention_mask: Tensor | None,
    keys: RotatedKeys,
    values: StaticValues,
    kernel: Any,
    scaling: float,
) -> Tensor:
    """Attention on rotated keys, which are used as they are cached.

    Args:
        query: rotated queries [b, h, 1, width_k] (absorbed gauge) or [b, h, 1, d].
        packed_key, packed_value: the cache of this layer, [b, 1, t, ...].
        attention_mask: boolean or additive, [b, 1, 1, t], or None to attend to everything.
        kernel: see `tpa_kernels.find_kernel`.

    Returns: what the output projection reads, [b, h, 1, width_v or d].
    """
    shape, groups = keys.shape, keys.heads
    linear = shape.form == "linear"
    query = keys.component_queries(query)
    mixed = decode_components(
        kernel,
        query,
        packed_key,
        packed_value,
        attention_mask,
        key_factors=shape.key_head_factors(groups),
        value_factors=shape.rank_v * groups if shape.contextual else 0,
        scale=scaling / shape.rank_k if linear else scaling,
        groups=groups,
    )
    if mixed is not None:
        return values.output(mixed / shape.rank_v if linear else mixed)
    if shape.key_head_factors(groups):
        weights = masked_softmax(keys.scores(query, packed_key) * scaling, attention_mask)
        return values.output(values.mix(weights, packed_value))
    return values.output(mix_shared(query, packed_key, packed_value, attention_mask, scaling))


def decode_rebuilt(
    query: Tensor,
    key: Tensor,
    parts: tuple[Tensor, ...],
    attention_mask: Tensor | None,
    values: StaticValues,
    scaling: float,
) -> Tensor:
    """Attention on keys that have been rebuilt, [b, j, t, d], with values made of `parts` of
    features side by side, [b, 1, t, ...] each; the rest is that of `decode_rotated`."""
    if not key.is_cuda:
        return values.output(mix_parts(query, key, parts, attention_mask, scaling))
    packed_value = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    return values.output(mix_shared(query, key, packed_value, attention_mask, scaling))


def mix_shared(
    query: Tensor, key: Tensor, packed_value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """PyTorch's attention of queries [b, h, 1, d] on keys [b, j, t, d] and features [b, 1, t, w]:
    [b, h, 1, w]."""
    # The query heads that share keys take the place of query positions.
    mixed = nn.functional.scaled_dot_product_attention(
        query.reshape(len(query), key.shape[1], -1, query.shape[-1]),
        key,
        packed_value.expand(-1, key.shape[1], -1, -1),
        attn_mask=mask,
        scale=scaling,
    )
    return mixed.flatten(1, 2).unsqueeze(2)


def mix_parts(
    query: Tensor, key: Tensor, parts: tuple[Tensor, ...], mask: Tensor | None, scaling: float
) -> Tensor:
    """The same of features that all heads share: PyTorch's own attention would copy them for every
    head on a CPU."""
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(*key.shape[:2], -1, key.shape[-1]) * scaling
    weights = masked_softmax(grouped.to(exact) @ key.to(exact).mT, mask)
    weights = weights.flatten(1, 2).unsqueeze(1).to(query.dtype)  # [b, 1, h, t]
    mixed = [weights @ part for part in parts]
    return (torch.cat(mixed, -1) if len(mixed) > 1 else mixed[0]).transpose(1, 2)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over [b, h, s, t] in fp32 at least, with a boolean or additive mask that broadcasts
    to it."""
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    exact = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=exact).to(scores.dtype)
