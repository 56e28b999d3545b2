"""What a model family must tell: where its weights live under Llama's names.

Everything downstream sees one layout, Llama's. A family is a value of `Architecture`, not a class
of its own; `architecture_of` picks it for a config, or says why the model cannot be converted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tpa_convert.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """A family of decoder-only models with Llama's computation, and how its parameters are stored.

    Attributes:
        model_type: as in the family's config.
        fused: modules of a layer that hold several of Llama's, stacked over the output dimension:
            `{"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj")}`.
        attention_bias: whether q, k and v have biases; None reads `config.attention_bias`.
        attention_output_bias: the same for o.
    """

    model_type: str
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attention_bias: bool | None = None
    attention_output_bias: bool | None = None

    def llama_state_dict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The model's parameters under Llama's names, as views that share the model's memory.

        Shapes and dtypes are the model's; `lm_head.weight` is present also when it is tied.

        Raises:
            UserError: the parameters are not laid out as this architecture says.
        """
        sizes = self._output_sizes(model.config)
        tensors: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            module, _, kind = name.rpartition(".")
            parts = next((p for key, p in self.fused.items() if module.endswith("." + key)), None)
            if parts is None:
                tensors[name] = tensor
                continue
            if tensor.shape[0] != sum(sizes[part] for part in parts):
                raise UserError(
                    f"{name} has {tensor.shape[0]} rows where a {self.model_type} model has "
                    f"{sum(sizes[part] for part in parts)}; register an architecture that fits it"
                )
            parent = module.rpartition(".")[0]
            for part, piece in zip(
                parts, tensor.split([sizes[part] for part in parts]), strict=True
            ):
                tensors[f"{parent}.{part}.{kind}"] = piece
        return tensors

    def llama_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The fields of Llama's config that describe this model, plus `attention_output_bias`.

        Llama itself has one `attention_bias` for q, k, v and o; here it speaks of q, k and v.
        """
        bias = getattr(config, "attention_bias", False)
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": head_dim_of(config),
            "hidden_act": config.hidden_act,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": copy.deepcopy(config.rope_parameters),
            "tie_word_embeddings": config.tie_word_embeddings,
            "mlp_bias": getattr(config, "mlp_bias", False),
            "attention_bias": bias if self.attention_bias is None else self.attention_bias,
            "attention_output_bias": (
                bias if self.attention_output_bias is None else self.attention_output_bias
            ),
            "initializer_range": config.initializer_range,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
        }

    def attention_scale(self, config: PreTrainedConfig) -> float:
        """The factor on q·k before the softmax."""
        return float(head_dim_of(config) ** -0.5)

    def _output_sizes(self, config: PreTrainedConfig) -> dict[str, int]:
        query = config.num_attention_heads * head_dim_of(config)
        key_value = config.num_key_value_heads * head_dim_of(config)
        return {
            "q_proj": query,
            "k_proj": key_value,
            "v_proj": key_value,
            "gate_proj": config.intermediate_size,
            "up_proj": config.intermediate_size,
        }


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of one head; some configs leave it to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


ALREADY_TPA = "this model is a TPA model already; convert the model it was made from"

_REGISTRY: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Makes a family known to `architecture_of`; a later registration replaces an earlier one."""
    _REGISTRY[architecture.model_type] = architecture


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a model with this config.

    Raises:
        UserError: the model cannot be converted; the message says why, in one line.
    """
    reason = _why_unsupported(config)
    if reason is not None:
        raise UserError(reason)
    return _REGISTRY[config.model_type]


# Families that normalise q and k before the rotation, and config flags that switch it on.
_QK_NORM_TYPES = {
    "qwen3",
    "qwen3_moe",
    "gemma3",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "olmoe",
    "chameleon",
}
_QK_NORM_FLAGS = ("use_qk_norm", "qk_layernorm", "qk_norm")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _why_unsupported(config: PreTrainedConfig) -> str | None:
    """One line on the first thing that stands in the way of a conversion, None if nothing does."""
    kind = config.model_type
    rope = getattr(config, "rope_parameters", None)
    if kind == "tpa":
        return ALREADY_TPA
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder model; only decoder-only models can be converted"
    if getattr(config, "kv_lora_rank", None):
        return f"{kind} uses multi-head latent attention (MLA), whose cache is compressed already"
    if getattr(config, "text_config", None) is not None:
        return f"{kind} is a multimodal model; save its language model alone and convert that"
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERT_COUNTS):
        return f"{kind} is a mixture-of-experts model, which is not supported yet; use a dense one"
    if not rope:
        return (
            f"{kind} has no rotary position embedding (RoPE), which TPA builds on; "
            "use a Llama-style model"
        )
    if kind in _QK_NORM_TYPES or any(getattr(config, name, False) for name in _QK_NORM_FLAGS):
        return f"{kind} normalises queries and keys (QK-norm), which is not supported yet"
    if any(isinstance(value, dict) for value in rope.values()):
        return f"the rotary embedding of {kind} differs between layers; this is not supported yet"
    if _rotary_share(config, rope) < 1:
        return f"{kind} rotates only a part of each head (partial RoPE); this is not supported yet"
    window = _active_sliding_window(config)
    if window is not None:
        return (
            f"{kind} attends in a sliding window of {window} tokens, which is not supported; set "
            '"sliding_window": null in a copy of its config.json to convert it with full attention'
        )
    if kind not in _REGISTRY:
        return (
            f"model type {kind!r} is unknown (known: {', '.join(sorted(_REGISTRY))}); describe it "
            "with tpa_convert.families.register_architecture"
        )
    return None


def _rotary_share(config: PreTrainedConfig, rope: Mapping[str, Any]) -> float:
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if share is None and getattr(config, "rotary_dim", None):
        return config.rotary_dim / head_dim_of(config)
    return 1.0 if share is None else share


def _active_sliding_window(config: PreTrainedConfig) -> int | None:
    """The window's length if any layer has one that is shorter than the context."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return window if window < config.max_position_embeddings else None
