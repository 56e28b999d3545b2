"""Whether a model is built as a record of its family says: names and shapes, weights or none."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from tpa_convert.modeling import (
    AttentionNames,
    normalised_together,
    source_head_dim,
    source_key_value_heads,
)

CONFIG_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def missing_parts(model: PreTrainedModel, names: AttentionNames) -> list[str]:
    """Everything that is not there, or of another shape; of layers that lack the same, once."""
    config: Any = model.config
    lacking = [name for name in CONFIG_FIELDS if not hasattr(config, name)]
    if lacking:
        return [f"{type(config).__name__} has no {', '.join(lacking)}"]
    decoder: Any = model.get_decoder()
    if decoder is None or decoder is model:
        return [f"{type(model).__name__} has no decoder (get_decoder returns none)"]
    problems = _lacks(decoder, [names.layers, names.rotary])
    for layer in getattr(decoder, names.layers, []):
        found = _lacks(layer, [names.attention])
        if not found:
            found = _attention_problems(getattr(layer, names.attention), names, config)
        problems += [problem for problem in found if problem not in problems]
    return problems


def key_norm_of(model: PreTrainedModel, names: AttentionNames) -> bool | Literal["all"]:
    """What `Family.key_norm` says of a model without missing parts."""
    layer = getattr(model.get_decoder(), names.layers)[0]
    norm = getattr(getattr(layer, names.attention), names.key_norm, None)
    config: Any = model.config
    return normalised_together(norm, source_head_dim(config), source_key_value_heads(config))


def _attention_problems(attention: nn.Module, names: AttentionNames, config: Any) -> list[str]:
    projections = [names.fused] if names.fused else [names.query, names.key, names.value]
    wanted = [*projections, names.output]
    if names.rotated_if is not None:
        wanted.append(names.rotated_if)
    problems = _lacks(attention, wanted)
    if problems:
        return problems
    head_dim = source_head_dim(config)
    heads, groups = config.num_attention_heads, source_key_value_heads(config)
    rows = [(heads + 2 * groups) * head_dim]
    if names.fused is None:
        rows = [heads * head_dim, groups * head_dim, groups * head_dim]
    shapes = [
        (name, (count, config.hidden_size)) for name, count in zip(projections, rows, strict=True)
    ]
    shapes.append((names.output, (config.hidden_size, heads * head_dim)))
    for name, shape in shapes:
        weight = getattr(getattr(attention, name), "weight", None)
        found = None if weight is None else tuple(weight.shape)
        if found != shape:
            problems.append(
                f"{type(attention).__name__}.{name} has a weight of {found} where "
                f"{heads} heads of {head_dim}, {groups} of them for keys, make {shape}"
            )
    return problems


def _lacks(module: nn.Module, wanted: list[str]) -> list[str]:
    missing = [name for name in wanted if not hasattr(module, name)]
    if not missing:
        return []
    found = ", ".join(name for name, _ in module.named_children())
    return [f"{type(module).__name__} has no {', '.join(missing)} (it has {found})"]
