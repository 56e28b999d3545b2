"""A converted model as a model of its source's own class, with merged weights.

The keys T_j b and the values U_j b are projections again: W_K = T B, W_V = U B. The result runs
wherever the source runs, and caches as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tpa_convert.errors import UserError
from tpa_convert.export.stock import (
    attention_layers,
    attention_prefixes,
    built,
    other_weights,
    source_class,
    weight_and_bias,
)
from tpa_convert.modeling import AttentionNames, TPAAttention
from tpa_convert.modeling.tpa_keys import KeyNorm, LatentKeys
from tpa_convert.sources.attention import half_split_order, in_order, rotated_dims

Rows = tuple[Tensor, Tensor | None]
"""Weight [n, D] and bias [n] of a projection."""


@torch.no_grad()
def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the source's class that computes what `model` computes, in its type.

    Raises:
        UserError: a projection cannot hold it; the message says which option of `convert` makes a
            model that it can.
    """
    layers, source = attention_layers(model), source_class(model)
    for i, layer in enumerate(layers):
        if reason := _obstacle(layer):
            raise UserError(f"layer {i} cannot be a layer of {source.__name__}: {reason}")
    names: AttentionNames = type(model.get_decoder()).attention_names  # type: ignore[attr-defined]
    parts = [_projections(layer, names) for layer in layers]
    config = _source_config(model, source, any(p["key"][1] is not None for p in parts))
    with torch.device("meta"):
        expected = source(config).state_dict()
    state = other_weights(model)
    for prefix, layer, part in zip(attention_prefixes(model), layers, parts, strict=True):
        found = _named(part, layer, names) | _norms(layer, names)
        for name, tensor in found.items():
            if prefix + name in expected:
                state[prefix + name] = tensor.contiguous()
            elif tensor.any():
                raise UserError(
                    f"{prefix}{name} has no place in a {source.__name__}, whose projections have "
                    "no biases; convert with --key-cache rotated"
                )
        for name, tensor in expected.items():  # biases that the converted model does without
            if name.startswith(prefix) and name not in state and name.endswith(".bias"):
                state[name] = torch.zeros(tensor.shape, dtype=model.dtype)
    exported = built(source, config, state)
    exported.generation_config = model.generation_config
    return exported


def _obstacle(layer: TPAAttention) -> str | None:
    shape = layer.shape
    if shape.coded:
        return "it caches codes of bits; convert with --cache-bits 16"
    if shape.contextual:
        return "its head factors depend on the token; convert with --form static"
    if shape.key_gauge == "absorbed":
        return "its queries have taken the gauge of the keys in; convert with --gauge applied"
    if shape.value_gauge == "absorbed" and shape.width_v > layer.head_dim:
        return "its output projection reads wider values; convert with --gauge applied"
    return None


def _source_order(layer: TPAAttention, names: AttentionNames) -> list[int] | None:
    """Which of a converted head's dimensions the source has at each place; None for the same."""
    rotated = 0
    if layer.table_order is not None:
        rotated = rotated_dims(layer.config, layer.head_dim, layer.layer_idx)
    order = half_split_order(layer.head_dim, rotated, names.pairs)
    return None if order is None else sorted(range(len(order)), key=order.__getitem__)


def _projections(layer: TPAAttention, names: AttentionNames) -> dict[str, Rows]:
    order = _source_order(layer, names)

    def ordered(rows: Rows) -> Rows:
        weight, bias = (None if x is None else in_order(x, layer.head_dim, order) for x in rows)
        assert weight is not None
        return weight, bias

    return {
        "query": ordered(weight_and_bias(layer.q_proj)),
        "key": ordered(_keys(layer)),
        "value": _values(layer),
        "output": _output(layer),
    }


def _keys(layer: TPAAttention) -> Rows:
    keys = layer.keys
    if isinstance(keys, LatentKeys):
        gauge: Tensor = keys.gauge.weight  # [j, d, width]
    else:
        gauge = keys.matrix()
    if keys.norm is not None:
        gauge = gauge / _divisor(keys.norm)[..., None]
    weight, bias = _through(gauge, keys.feature_factor)
    offset = getattr(keys.gauge, "offset", None)
    if offset is not None:
        shift = offset if keys.norm is None else offset / _divisor(keys.norm)
        bias = shift.flatten() if bias is None else bias + shift.flatten()
    return weight, bias


def _values(layer: TPAAttention) -> Rows:
    values = layer.values
    if values.gauge is not None:
        return _through(values.gauge.weight, values.feature_factor)
    # All heads read the same components, with zeros behind them.
    gauge = torch.eye(layer.head_dim, values.shape.width_v).to(values.feature_factor.weight)
    return _through(gauge.expand(values.heads, -1, -1), values.feature_factor)


def _output(layer: TPAAttention) -> Rows:
    weight, bias = weight_and_bias(layer.o_proj)
    columns = weight.unflatten(1, (layer.num_heads, -1))
    room = layer.head_dim - columns.shape[2]
    return nn.functional.pad(columns, (0, room)).flatten(1), bias


def _through(gauge: Tensor, feature_factor: nn.Module) -> Rows:
    """Projection to heads: [j, d, width] after [width, D]."""
    weight, bias = weight_and_bias(feature_factor)
    return (gauge @ weight).flatten(0, 1), None if bias is None else (gauge @ bias).flatten()


def _divisor(norm: KeyNorm) -> Tensor:
    """γ', the norm's weight kept away from zero, as `KeyNorm` has it."""
    least = norm.least * norm.weight.abs().max()
    return torch.where(norm.weight.abs() < least, least, norm.weight)


def _named(parts: dict[str, Rows], layer: TPAAttention, names: AttentionNames) -> dict[str, Tensor]:
    """Projections under the source's names."""
    if names.fused is not None:
        rows = [parts[part] for part in ("query", "key", "value")]
        biases = [weight.new_zeros(len(weight)) if b is None else b for weight, b in rows]

        def together(of_parts: list[Tensor]) -> Tensor:
            if not names.fused_by_head:
                return torch.cat(of_parts)
            size = layer.num_key_value_heads, -1, layer.head_dim
            return torch.cat([part.unflatten(0, size) for part in of_parts], 1).flatten(0, 2)

        stacked = together([weight for weight, _ in rows]), together(biases)
        named = {names.fused: stacked, names.output: parts["output"]}
    else:
        named = {getattr(names, part): rows for part, rows in parts.items()}
    found = {}
    for name, (weight, bias) in named.items():
        found[f"{name}.weight"] = weight
        if bias is not None:
            found[f"{name}.bias"] = bias
    return found


def _norms(layer: TPAAttention, names: AttentionNames) -> dict[str, Tensor]:
    """Weights of the norms of queries and keys, as the family stores them."""
    found, order = {}, _source_order(layer, names)
    if layer.q_norm is not None:
        for name, tensor in layer.q_norm.state_dict().items():
            found[f"{names.query_norm}.{name}"] = in_order(tensor, layer.head_dim, order)
    if layer.keys.norm is not None:
        norm = layer.keys.norm
        assert layer.q_norm is not None
        ((name, stored),) = layer.q_norm.state_dict().items()
        ones = torch.ones_like(stored)
        gain = layer.q_norm(ones) * (1 + norm.eps) ** 0.5  # of queries, from what is stored
        latent = isinstance(layer.keys, LatentKeys)
        wanted = norm.weight if latent else _divisor(norm)
        # Some families store the gain, others what it exceeds 1 by.
        weight = wanted.flatten() - (gain - stored).round()[0]
        found[f"{names.key_norm}.{name}"] = in_order(weight, layer.head_dim, order)
    return found


def _source_config(model: PreTrainedModel, source: Any, key_bias: bool) -> Any:
    """The source's config, with biases on the projections if the keys have a constant part."""
    values = model.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "tpa_layers", "transformers_version"):
        values.pop(name, None)
    if key_bias and "attention_bias" in values:
        values["attention_bias"] = True
    return source.config_class(**values)
