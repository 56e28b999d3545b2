"""A converted model as a stock `LlamaForCausalLM` with one KV head.

Components of static rotated keys are numbers on rotary pairs that all heads share: the keys of a
single head, whose pairs turn at the frequencies of the components. Queries that have met the gauge
are queries of that head, and values likewise:

    q' = conj(T) q,  k' = b_K,  v' = b_V,  O' = O U

Llama has one table of frequencies for all layers, so a pair gets as many slots as the layer that
has most components on it; what a layer leaves free is zero. The table is written as `longrope`, the
one scaling of transformers that takes any factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from tpa_convert.errors import UserError
from tpa_convert.export.absorption import component_output, component_queries
from tpa_convert.export.stock import (
    attention_layers,
    attention_prefixes,
    built,
    other_weights,
    source_class,
    weight_and_bias,
)
from tpa_convert.modeling import TPAAttention
from tpa_convert.modeling.tpa_codes import round_up
from tpa_convert.modeling.tpa_keys import RotatedKeys

SAME_DECODERS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Phi3ForCausalLM)
"""Their layers are Llama's but for the attention, perhaps with weights stacked or with biases."""
CHANGING_ROPE = ("dynamic", "longrope")
HEAD_MULTIPLE = 8  # what attention kernels ask of a head
STANDING = 1e12  # factor on the wavelength of a pair that does not turn


@dataclass(frozen=True)
class Slots:
    """Where the components of every layer lie in the one head.

    Attributes:
        pairs: the source's rotary pair of each slot.
        layers: the slot of each component, for each layer.
        head_dim: of the head; at least two numbers a slot.
    """

    pairs: tuple[int, ...]
    layers: tuple[Tensor, ...]
    head_dim: int


@torch.no_grad()
def to_llama(model: PreTrainedModel) -> PreTrainedModel:
    """A Llama that computes what `model` computes, in its type.

    Raises:
        UserError: a Llama cannot hold it; the message says which option of `convert` makes a model
            that it can.
    """
    layers = attention_layers(model)
    check_expressible(model, layers)
    slots = shared_slots(layers)
    state = _with_split_mlp(other_weights(model))
    biases = any("bias" in name for layer in layers for name, _ in layer.named_parameters())
    for prefix, layer, places in zip(attention_prefixes(model), layers, slots.layers, strict=True):
        parts = _attention(layer, places, slots, _rotary(model))
        for name, (weight, bias) in parts.items():
            state[f"{prefix}{name}.weight"] = weight.contiguous()
            if biases:
                rows = weight.new_zeros(len(weight))
                state[f"{prefix}{name}.bias"] = rows if bias is None else bias.contiguous()
    exported = built(LlamaForCausalLM, _config(model, slots, biases, state), state)
    exported.generation_config = model.generation_config
    return exported


def check_expressible(model: PreTrainedModel, layers: Sequence[TPAAttention]) -> None:
    """Refuses what a Llama has no place for, in one line with what helps.

    Raises:
        UserError: see `to_llama`.
    """
    check_source(source_class(model), model.config)
    for i, layer in enumerate(layers):
        if reason := _obstacle(layer):
            raise UserError(f"layer {i} cannot be a Llama's: {reason}")


def check_source(source: Any, config: Any) -> None:
    """Refuses sources of which no conversion can be a Llama.

    Args:
        source: class of transformers.

    Raises:
        UserError: what is in the way.
    """
    if source not in SAME_DECODERS:
        raise UserError(
            f"a {source.__name__} is no Llama inside: export it with --to dense, which keeps its "
            "own class but not the small cache"
        )
    kind = config.rope_parameters["rope_type"]
    if kind in CHANGING_ROPE:
        raise UserError(
            f"the frequencies of its RoPE change with the length ({kind}), those of the exported "
            "table cannot: export it with --to dense"
        )
    if getattr(config, "sliding_window", None) is not None:
        raise UserError(
            "it attends in a window, which a Llama cannot: export it with --to dense, or set its "
            "sliding_window to null where no text is longer"
        )


def _obstacle(layer: TPAAttention) -> str | None:
    shape = layer.shape
    if shape.coded:
        return "it caches codes of bits; convert with --cache-bits 16"
    if shape.contextual:
        return "its head factors depend on the token; convert with --form static"
    if shape.latent_keys:
        return "its keys are latent; convert with --key-cache rotated"
    if shape.key_norm:
        return "its keys are normalised (QK-norm); export with --to dense"
    if layer.sliding_window is not None or layer.softcap is not None:
        return "it attends in a window or caps its scores; export with --to dense"
    return None


def shared_slots(layers: Sequence[TPAAttention]) -> Slots:
    """One table for all layers: as many slots on a rotary pair as the layer that has most there."""
    pairs = [cast(RotatedKeys, layer.keys).rotary_pair for layer in layers]
    counts = torch.stack([p.bincount(minlength=layers[0].head_dim // 2) for p in pairs])
    widest = counts.amax(0)
    first = widest.cumsum(0) - widest
    places = []
    for of_layer, count in zip(pairs, counts, strict=True):
        order = of_layer.argsort(stable=True)
        within = torch.arange(len(order)) - (count.cumsum(0) - count)[of_layer[order]]
        slots = torch.empty_like(order)
        slots[order] = first[of_layer[order]] + within
        places.append(slots)
    needed = max(2 * int(widest.sum()), *(layer.shape.width_v for layer in layers))
    head_dim = round_up(needed, HEAD_MULTIPLE)
    table = torch.arange(len(widest)).repeat_interleave(widest)
    return Slots(tuple(table.tolist()), tuple(places), head_dim)


def _attention(
    layer: TPAAttention, places: Tensor, slots: Slots, rotary: Any
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of each projection of the one head."""
    keys, values = cast(RotatedKeys, layer.keys), cast(Any, layer.values)
    half, wide = slots.head_dim // 2, slots.head_dim
    # Llama divides scores by the root of its head dim, and its tables have no scale of their own.
    scale = layer.scaling * slots.head_dim**0.5
    turning = torch.tensor(slots.pairs)[places] < len(rotary.inv_freq)
    scales = torch.where(turning, scale * rotary.attention_scaling**2, scale)

    def spread(components: Tensor) -> Tensor:
        """Components [n, 2 P, columns] in the slots of the head: [n, head dim, columns]."""
        n, _, columns = components.shape
        spaced = components.new_zeros(n, 2, half, columns)
        spaced[:, :, places] = components.unflatten(1, (2, -1))
        return spaced.flatten(1, 2)

    def query(rows: Tensor) -> Tensor:
        """Rows [h d, columns] of the query projection, as queries of the one head."""
        components = component_queries(keys, rows, layer.num_heads)
        scaled = components.unflatten(1, (2, -1)) * scales.to(rows)[:, None]
        return spread(scaled.flatten(1, 2)).flatten(0, 1)

    def padded(rows: Tensor) -> Tensor:
        return torch.cat((rows, rows.new_zeros(wide - len(rows), rows.shape[1])))

    output, output_bias = weight_and_bias(layer.o_proj)
    gauge = None if values.gauge is None else values.gauge.weight
    columns = component_output(gauge, output, layer.num_heads)
    columns = torch.nn.functional.pad(columns, (0, wide - columns.shape[2]))

    def both(projection: Any, change: Any) -> tuple[Tensor, Tensor | None]:
        weight, bias = weight_and_bias(projection)
        return change(weight), None if bias is None else change(bias[:, None])[:, 0]

    return {
        "q_proj": both(layer.q_proj, query),
        "k_proj": both(keys.feature_factor, lambda rows: spread(rows[None])[0]),
        "v_proj": both(values.feature_factor, padded),
        "o_proj": (columns.flatten(1), output_bias),
    }


def _rotary(model: PreTrainedModel) -> Any:
    return cast(Any, model.get_decoder()).rotary_emb


def frequency_factors(model: PreTrainedModel, slots: Slots) -> list[float]:
    """What the wavelength of each pair of the head is multiplied by: 1 / (θ_f(p) base^(2p/D))."""
    theta = _rotary(model).inv_freq.double().cpu()
    rest = max(0, max(slots.pairs) + 1 - len(theta))  # pairs that the source does not rotate
    theta = torch.nn.functional.pad(theta, (0, rest))
    base = model.config.rope_parameters["rope_theta"]
    half = slots.head_dim // 2
    plain = torch.tensor(base, dtype=torch.float64) ** (-torch.arange(half) / half)
    wanted = plain.clone()  # of slots that no component lies on, the plain one
    wanted[: len(slots.pairs)] = theta[list(slots.pairs)]
    return (plain / wanted).clamp(max=STANDING).tolist()


def _config(model: PreTrainedModel, slots: Slots, biases: bool, state: Any) -> LlamaConfig:
    config = model.config
    factors = frequency_factors(model, slots)
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=1,
        head_dim=slots.head_dim,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=biases,
        mlp_bias=any(".mlp." in name and name.endswith(".bias") for name in state),
        dtype=config.dtype,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": config.rope_parameters["rope_theta"],
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            # engines scale attention where a context is longer than the original one
            "original_max_position_embeddings": config.max_position_embeddings,
        },
    )


def _with_split_mlp(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked projections of the feed-forward part as Llama has them."""
    split = {}
    for name, tensor in state.items():
        if ".gate_up_proj." in name:
            for part, rows in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                split[name.replace("gate_up_proj", part)] = rows.contiguous()
        else:
            split[name] = tensor
    return split
