"""The projections of one attention layer of a source, as the decompositions want them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tpa_convert.decomposition import AttentionWeights, HeadNorm
from tpa_convert.errors import UserError
from tpa_convert.modeling import (
    AttentionNames,
    PairOrder,
    norm_epsilon,
    norm_width,
    sliding_window,
    source_head_dim,
    source_key_value_heads,
)


def attention_weights(
    attention: Any,
    names: AttentionNames,
    config: Any,
    layer_idx: int,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device | None = None,
) -> AttentionWeights:
    """Weights of a source's attention module, biases as a last column.

    Rotary pairs are made half-split over the whole head: the pair p is (p, p + d/2), whatever the
    source rotates. Of keys that are normalised, the norm's weight γ is folded in.

    Args:
        attention: of layer `layer_idx` of the source.
        config: of the source.
        dtype, device: of the result; by default fp64, where the weights are.

    Raises:
        UserError: projections whose shapes do not fit the config.
    """
    head_dim = source_head_dim(config)
    heads, groups = config.num_attention_heads, source_key_value_heads(config)
    order = head_order(attention, names, config, layer_idx)
    query, key, value = (
        part.to(device, dtype).unflatten(0, (-1, head_dim))
        for part in _projections(attention, names, heads, groups, head_dim, layer_idx)
    )
    output = getattr(attention, names.output)
    query_norm, key_norm = (
        _head_norm(getattr(attention, name, None), head_dim, query)
        for name in (names.query_norm, names.key_norm)
    )
    if key_norm is not None:
        key = key * key_norm.divisor[..., None]
    if order is not None:  # a norm is the same in any order, its weight but for that
        query, key = query[:, order], key[:, order]
        query_norm, key_norm = (
            None if norm is None else replace(norm, weight=norm.weight[..., order])
            for norm in (query_norm, key_norm)
        )
    return AttentionWeights(
        query=query,
        key=key,
        value=value,
        output=output.weight.to(query).unflatten(1, (-1, head_dim)),
        output_bias=None if output.bias is None else output.bias.to(query),
        scale=getattr(attention, "scaling", head_dim**-0.5),
        query_norm=query_norm,
        key_norm=key_norm,
        window=sliding_window(attention, config, layer_idx),
        softcap=getattr(attention, "attn_logit_softcapping", None),
    )


def query_norm_parameters(
    attention: Any, names: AttentionNames, config: Any, layer_idx: int
) -> dict[str, Tensor]:
    """Parameters of the norm of the queries, which stays the source's own module, by their names
    in a `TPAAttention`: for queries in the order that `attention_weights` gives them."""
    norm = getattr(attention, names.query_norm, None)
    if norm is None:
        return {}
    order = head_order(attention, names, config, layer_idx)
    return {
        f"q_norm.{name}": in_order(tensor, source_head_dim(config), order)
        for name, tensor in norm.state_dict().items()
    }


def in_order(rows: Tensor, head_dim: int, order: list[int] | None) -> Tensor:
    """Rows [heads * head_dim, ...] with the dimensions of each head in another order."""
    return rows if order is None else rows.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


def head_order(
    attention: Any, names: AttentionNames, config: Any, layer_idx: int
) -> list[int] | None:
    """`half_split_order` of a layer of the source."""
    head_dim, rotated = source_head_dim(config), 0
    if names.table_order(attention) is not None:
        rotated = rotated_dims(config, head_dim, layer_idx)
    return half_split_order(head_dim, rotated, names.pairs)


def rotated_dims(config: Any, head_dim: int, layer_idx: int) -> int:
    """How many of a head's dimensions the source rotates."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer_idx] in rope:
        rope = rope[kinds[layer_idx]]
    if rope.get("rope_type") == "proportional":
        return head_dim  # pairs of the whole head, those beyond the share with frequency 0
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    # transformers' table has a column for each half of a pair, also where the share leaves a rest.
    return head_dim if share is None else -(-int(head_dim * share) // 2) * 2


def half_split_order(head_dim: int, rotated: int, pairs: PairOrder = "halves") -> list[int] | None:
    """Order of a head's dimensions that makes p and p + head_dim / 2 a pair; None if it is so.

    The source has its pairs among the first `rotated` dimensions. The others, which it does not
    rotate, form pairs among themselves.
    """
    half, rest = rotated // 2, (head_dim - rotated) // 2
    first, second = range(half), range(half, rotated)
    if pairs == "neighbours":
        first, second = range(0, rotated, 2), range(1, rotated, 2)
    parts = (first, range(rotated, rotated + rest), second, range(rotated + rest, head_dim))
    order = [dimension for part in parts for dimension in part]
    return None if order == list(range(head_dim)) else order


def _projections(
    attention: Any,
    names: AttentionNames,
    heads: int,
    groups: int,
    head_dim: int,
    layer_idx: int,
) -> list[Tensor]:
    """Rows of the queries, keys and values: weights with the bias as a last column."""
    rows = [heads * head_dim, groups * head_dim, groups * head_dim]
    if names.fused is not None:
        parts = [_with_bias(getattr(attention, names.fused))]
        wanted = [sum(rows)]
    else:
        parts = [
            _with_bias(getattr(attention, name)) for name in (names.query, names.key, names.value)
        ]
        wanted = rows
    for part, count in zip(parts, wanted, strict=True):
        if len(part) != count:
            name = names.fused or "one of the projections"
            raise UserError(
                f"layer {layer_idx}: {name} has {len(part)} rows where the config says {count}; "
                "check that config.json belongs to these weights"
            )
    if names.fused is None:
        return parts
    if not names.fused_by_head:
        return list(parts[0].split(rows))
    by_head = parts[0].unflatten(0, (groups, heads // groups + 2, head_dim))
    return [part.flatten(0, 2) for part in (by_head[:, :-2], by_head[:, -2:-1], by_head[:, -1:])]


def _with_bias(projection: Any) -> Tensor:
    weight = projection.weight
    bias = weight.new_zeros(len(weight)) if projection.bias is None else projection.bias
    return torch.cat((weight, bias[:, None]), dim=1)


@torch.no_grad()
def _head_norm(norm: nn.Module | None, head_dim: int, like: Tensor) -> HeadNorm | None:
    """The weight γ and the constant of an RMS norm over a head, or over all of them, however the
    family stores them."""
    if norm is None:
        return None
    eps = norm_epsilon(norm)
    parameter = next(norm.parameters())
    ones = torch.ones(norm_width(norm), dtype=parameter.dtype, device=parameter.device)
    # The mean square of ones is 1: what comes out is γ / √(1 + ε).
    weight = norm(ones).to(like) * (1.0 + eps) ** 0.5
    return HeadNorm(weight if len(weight) == head_dim else weight.unflatten(0, (-1, head_dim)), eps)
