"""The projections of one attention layer of a source, as the decompositions want them."""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_convert.decomposition import AttentionWeights
from tpa_convert.sources.load import Source


def attention_weights(
    source: Source, state: dict[str, Tensor], layer: int, dtype: torch.dtype = torch.float64
) -> AttentionWeights:
    """Weights of `layer`, biases as a last column.

    Args:
        source: the loaded source.
        state: its parameters under Llama names (`Architecture.llama_state_dict`).
        dtype: of the result.
    """
    config = source.architecture.llama_config(source.model.config)
    head_dim = config["head_dim"]
    prefix = f"model.layers.{layer}.self_attn."

    def heads(name: str) -> Tensor:
        weight = state[f"{prefix}{name}.weight"].to(dtype)
        bias = state.get(f"{prefix}{name}.bias")
        bias = weight.new_zeros(len(weight)) if bias is None else bias.to(dtype)
        return torch.cat((weight, bias[:, None]), dim=1).unflatten(0, (-1, head_dim))

    output_bias = state.get(f"{prefix}o_proj.bias")
    return AttentionWeights(
        query=heads("q_proj"),
        key=heads("k_proj"),
        value=heads("v_proj"),
        output=state[f"{prefix}o_proj.weight"].to(dtype).unflatten(1, (-1, head_dim)),
        output_bias=None if output_bias is None else output_bias.to(dtype),
        scale=source.architecture.attention_scale(source.model.config),
    )
