"""Models with Tensor Product Attention, registered with transformers' Auto classes on import.

One module a family (`tpa_llama`, ...) holds its config and its two models, all written alike; the
others hold what families share. Whatever is saved brings these files along, so that it loads where
this package is not installed.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import legacy, tpa_gemma3_text, tpa_llama, tpa_mistral, tpa_phi3, tpa_qwen2, tpa_qwen3
from .tpa_attention import (
    AttentionNames,
    TPAAttention,
    given_cache,
    norm_epsilon,
    sliding_window,
)
from .tpa_codes import CLASSES, RowLayout
from .tpa_configuration import (
    Form,
    Gauge,
    KeyCache,
    LayerShape,
    TPAConfigMixin,
    codes_of,
    groups_of,
    source_head_dim,
)
from .tpa_model import TPAModelMixin
from .tpa_rotary import pair_table


def register(causal_lm: Any, with_code: bool = True) -> None:
    """Makes a family's models known to the Auto classes, and their code part of exports."""
    config, decoder = causal_lm.config_class, causal_lm.decoder_class
    if with_code:
        config.register_for_auto_class()
        decoder.register_for_auto_class("AutoModel")
        causal_lm.register_for_auto_class("AutoModelForCausalLM")
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, decoder, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


for _causal_lm in (
    tpa_gemma3_text.TPAGemma3ForCausalLM,
    tpa_llama.TPALlamaForCausalLM,
    tpa_mistral.TPAMistralForCausalLM,
    tpa_phi3.TPAPhi3ForCausalLM,
    tpa_qwen2.TPAQwen2ForCausalLM,
    tpa_qwen3.TPAQwen3ForCausalLM,
):
    register(_causal_lm)

AutoConfig.register("tpa", legacy.TPAConfig, exist_ok=True)
AutoModelForCausalLM.register(legacy.TPAConfig, legacy.TPAForCausalLM, exist_ok=True)

__all__ = [
    "CLASSES",
    "AttentionNames",
    "Form",
    "Gauge",
    "KeyCache",
    "LayerShape",
    "RowLayout",
    "TPAAttention",
    "TPAConfigMixin",
    "TPAModelMixin",
    "codes_of",
    "given_cache",
    "groups_of",
    "norm_epsilon",
    "pair_table",
    "register",
    "sliding_window",
    "source_head_dim",
]
