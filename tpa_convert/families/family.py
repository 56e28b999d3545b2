"""What a model family must tell, and which families are known.

Everything downstream works on the source's own model. A family is one small value: the classes that
put Tensor Product Attention into it. Where its attention is and what its projections are called
stands in these classes, since they travel with an export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tpa_convert.errors import UserError
from tpa_convert.families.class_pair import class_pair
from tpa_convert.families.own_code import warn_of_code_that_cannot_travel
from tpa_convert.families.parts import key_norm_of, missing_parts
from tpa_convert.modeling import (
    CAUSAL_LMS,
    AttentionNames,
    register,
    source_head_dim,
    source_key_value_heads,
)


@dataclass(frozen=True)
class Family:
    """A family of decoder-only models whose attention can be replaced.

    Attributes:
        model_type: as in the config of the source.
        title: what people call it.
        converted: class of the converted models, as in `modeling/tpa_llama.py`; by default what
            `modeling` has for this `model_type`.
        key_norm: whether queries and keys are normalised for each head (QK-norm), or "all" heads
            together.
        refused: fields of the source's config that turn on what a converted layer does not do, and
            what that is.
    """

    model_type: str
    title: str = ""
    converted: Any = None
    key_norm: bool | Literal["all"] = False
    key_norm_if: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def causal_lm(self) -> Any:
        """Class of the converted models."""
        return self.converted or CAUSAL_LMS[self.model_type]

    @property
    def names(self) -> AttentionNames:
        """Where the attention and its projections are."""
        return self.model_class.attention_names

    @property
    def config_class(self) -> Any:
        """Config of the converted models."""
        return self.causal_lm.config_class

    @property
    def model_class(self) -> Any:
        """The converted decoder without its head."""
        return self.causal_lm.decoder_class

    @property
    def attention_implementation(self) -> str:
        """What its models run with: sdpa, which is causal without a mask, or eager where the
        family does what sdpa cannot (soft caps)."""
        return "sdpa" if self.causal_lm._supports_sdpa else "eager"

    @property
    def source_class(self) -> Any:
        """The source's model with its head."""
        return self.causal_lm.__bases__[-1]

    def attention_sizes(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Sizes of the attention layers of a model with this config."""
        groups, norm = source_key_value_heads(config), self.key_norm
        if self.key_norm_if is not None and not getattr(config, self.key_norm_if):
            norm = False
        return {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": groups,
            "head_dim": source_head_dim(config),
            # Of one head, a norm over all heads is a norm of each.
            "key_norm": norm if groups > 1 else bool(norm),
        }

    @property
    def registered(self) -> bool:
        """Whether its classes are not the package's own."""
        return self.converted is not None

    def check_names(self, model: PreTrainedModel) -> None:
        """Refuses a model that is not built as the record says.

        Args:
            model: of the source; its weights may be anywhere, also nowhere.

        Raises:
            UserError: all that is missing, and what is there instead.
        """
        problems = missing_parts(model, self.names)
        if problems:
            raise UserError(
                f"{self.model_type}: {'; '.join(problems)}: register the family with the names "
                f"that it uses ({CUSTOM_PAGE})"
            )

    def tpa_config(self, config: PreTrainedConfig, layers: list[dict[str, Any]]) -> Any:
        """Config of the model that a source with this config becomes.

        Args:
            layers: the fields of `LayerShape` for each layer.

        Raises:
            ValueError: shapes that cannot be built.
        """
        values = config.to_dict()
        for name in ("model_type", "architectures", "transformers_version", "auto_map"):
            values.pop(name, None)
        values.pop("quantization_config", None)
        values["dtype"] = config.dtype  # not its name: models read it while they are made
        converted = self.config_class(**values, tpa_layers=layers)
        implementation = config._attn_implementation or self.attention_implementation
        converted._attn_implementation = implementation
        return converted


ALREADY_TPA = "this model is a TPA model already; convert the model it was made from"

_REGISTRY: dict[str, Family] = {}


def add_family(family: Family) -> None:
    """Makes a family known to `family_of`; a later registration replaces an earlier one."""
    _REGISTRY[family.model_type] = family


def register_family(
    config: type[PreTrainedConfig],
    model: type[PreTrainedModel],
    causal_lm: type[PreTrainedModel],
    names: AttentionNames | None = None,
    *,
    refused: Mapping[str, str] | None = None,
    example: PreTrainedConfig | None = None,
) -> Family:
    """Makes a class that the package does not know convertible, and its conversions loadable.

    The source's classes become known to transformers' Auto classes too. A model is made without
    weights to see whether names and shapes are as the record says.

    Args:
        config, model, causal_lm: the source's config, decoder and decoder with head.
        names: where its attention is and what its projections are called.
        refused: as `Family` has it.
        example: a config to make that model of; by default `config()`.

    Raises:
        UserError: everything that the record says and the model has not.
    """
    names = names or AttentionNames()
    for cls in (model, causal_lm):
        if cls.config_class is not config:
            raise UserError(f"{cls.__name__} has another config_class than {config.__name__}")
    converted = class_pair(config, model, causal_lm, names)
    family = Family(config.model_type, converted=converted, refused=refused or {})
    with torch.device("meta"):
        source = causal_lm(config() if example is None else example)
    family.check_names(source)
    family = replace(family, key_norm=key_norm_of(source, names))
    if names.layers != "layers":  # what walks over a model calls them that
        cast(Any, model).layers = property(lambda decoder: getattr(decoder, names.layers))
    warn_of_code_that_cannot_travel(config, model, causal_lm)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    register(converted, with_code=False)
    add_family(family)
    return family


def is_tpa(config: PreTrainedConfig) -> bool:
    """Whether a config is of a converted model."""
    return config.model_type == "tpa" or getattr(config, "tpa_layers", None) is not None


def experts_of(config: PreTrainedConfig) -> int:
    """How many experts each layer has, 0 for none."""
    names = "num_experts", "num_local_experts"  # configs that say otherwise map one of these to it
    return next((count for name in names if (count := getattr(config, name, None))), 0)


def language_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a multimodal model's language model, if that is of a known family; else the
    config as it is."""
    text = getattr(config, "text_config", None)
    if config.model_type in _REGISTRY or text is None or text.model_type not in _REGISTRY:
        return config
    return text


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model with this config.

    Raises:
        UserError: the model cannot be converted; the message says why, in one line.
    """
    reason = _why_unsupported(config)
    if reason is not None:
        raise UserError(reason)
    return _REGISTRY[config.model_type]


CUSTOM_PAGE = "docs/custom-architectures.md"
_OTHER_ATTENTION = {
    "afmoe": "gates behind the attention",
    "bitnet": "a norm in front of the output projection",
    "diffllama": "differential attention",
    "doge": "a mask that is computed from the values",
    "gpt_oss": "attention sinks",
    "granite_swa": "attention sinks",
    "granitemoe_swa": "attention sinks",
    "hunyuan_v1_dense": "norms of queries and keys behind their rotation",
    "hunyuan_v1_moe": "norms of queries and keys behind their rotation",
    "laguna": "gates behind the attention",
    "mimo_v2_flash": "keys and values of different sizes",
    "nanochat": "norms of queries and keys behind their rotation",
}
"""What families of transformers have that a converted layer does not do."""

_SOFTMAX_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def _why_unsupported(config: PreTrainedConfig) -> str | None:
    """One line on the first thing that stands in the way of a conversion, None if nothing does."""
    kind = config.model_type
    if is_tpa(config):
        return ALREADY_TPA
    if kind in _REGISTRY:
        for name, what in _REGISTRY[kind].refused.items():
            if getattr(config, name, None):
                return f"{kind} with {name} has {what}, which is not supported"
        return None
    if kind in _OTHER_ATTENTION:
        return f"{kind} has {_OTHER_ATTENTION[kind]}, which is not supported"
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder model; only decoder-only models can be converted"
    if getattr(config, "kv_lora_rank", None):
        return f"{kind} uses multi-head latent attention (MLA), whose cache is compressed already"
    if getattr(config, "text_config", None) is not None:
        text = config.text_config.model_type
        return (
            f"{kind} is a multimodal model whose language model ({text}) is of no known family, so "
            "it cannot be converted"
        )
    others = set(getattr(config, "layer_types", None) or ()) - _SOFTMAX_LAYERS
    if others:
        return (
            f"{kind} has layers of other kinds ({', '.join(sorted(others))}), which cannot be "
            "converted; use a model that has softmax attention in all of its layers"
        )
    if not getattr(config, "rope_parameters", None):
        return (
            f"{kind} has no rotary position embedding (RoPE), which TPA builds on; "
            "use a Llama-style model"
        )
    return (
        f"model type {kind!r} is unknown (known: {', '.join(sorted(_REGISTRY))}); {CUSTOM_PAGE} "
        "shows how to describe it"
    )
