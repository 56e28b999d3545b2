"""Models with Tensor Product Attention, registered with transformers' Auto classes on import.

One module a family (`tpa_llama`, ...) holds its config and its two models, all written alike; the
others hold what families share. Whatever is saved brings these files along, so that it loads where
this package is not installed.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import (
    legacy,
    tpa_apertus,
    tpa_arcee,
    tpa_cohere,
    tpa_cohere2,
    tpa_cwm,
    tpa_dots1,
    tpa_ernie4_5,
    tpa_ernie4_5_moe,
    tpa_exaone4,
    tpa_flex_olmo,
    tpa_gemma,
    tpa_gemma2,
    tpa_gemma3_text,
    tpa_glm,
    tpa_glm4,
    tpa_glm4_moe,
    tpa_gpt_neox,
    tpa_granite,
    tpa_granitemoe,
    tpa_granitemoeshared,
    tpa_llama,
    tpa_minimax_m2,
    tpa_ministral,
    tpa_ministral3,
    tpa_mistral,
    tpa_mixtral,
    tpa_nemotron,
    tpa_olmo,
    tpa_olmo2,
    tpa_olmo3,
    tpa_olmoe,
    tpa_phi,
    tpa_phi3,
    tpa_phimoe,
    tpa_qwen2,
    tpa_qwen2_moe,
    tpa_qwen3,
    tpa_qwen3_moe,
    tpa_seed_oss,
    tpa_smollm3,
    tpa_solar_open,
    tpa_stablelm,
    tpa_starcoder2,
)
from .tpa_attention import TPAAttention
from .tpa_cache import given_cache
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
    source_key_value_heads,
)
from .tpa_model import TPAModelMixin
from .tpa_rotary import PairOrder, pair_table
from .tpa_source import (
    AttentionNames,
    norm_epsilon,
    norm_width,
    normalised_together,
    sliding_window,
)


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


CAUSAL_LMS = {
    "apertus": tpa_apertus.TPAApertusForCausalLM,
    "arcee": tpa_arcee.TPAArceeForCausalLM,
    "cohere": tpa_cohere.TPACohereForCausalLM,
    "cohere2": tpa_cohere2.TPACohere2ForCausalLM,
    "cwm": tpa_cwm.TPACwmForCausalLM,
    "dots1": tpa_dots1.TPADots1ForCausalLM,
    "ernie4_5": tpa_ernie4_5.TPAErnie4_5ForCausalLM,
    "ernie4_5_moe": tpa_ernie4_5_moe.TPAErnie4_5_MoeForCausalLM,
    "exaone4": tpa_exaone4.TPAExaone4ForCausalLM,
    "flex_olmo": tpa_flex_olmo.TPAFlexOlmoForCausalLM,
    "gemma": tpa_gemma.TPAGemmaForCausalLM,
    "gemma2": tpa_gemma2.TPAGemma2ForCausalLM,
    "gemma3_text": tpa_gemma3_text.TPAGemma3ForCausalLM,
    "glm": tpa_glm.TPAGlmForCausalLM,
    "glm4": tpa_glm4.TPAGlm4ForCausalLM,
    "glm4_moe": tpa_glm4_moe.TPAGlm4MoeForCausalLM,
    "gpt_neox": tpa_gpt_neox.TPAGPTNeoXForCausalLM,
    "granite": tpa_granite.TPAGraniteForCausalLM,
    "granitemoe": tpa_granitemoe.TPAGraniteMoeForCausalLM,
    "granitemoeshared": tpa_granitemoeshared.TPAGraniteMoeSharedForCausalLM,
    "llama": tpa_llama.TPALlamaForCausalLM,
    "minimax_m2": tpa_minimax_m2.TPAMiniMaxM2ForCausalLM,
    "ministral": tpa_ministral.TPAMinistralForCausalLM,
    "ministral3": tpa_ministral3.TPAMinistral3ForCausalLM,
    "mistral": tpa_mistral.TPAMistralForCausalLM,
    "mixtral": tpa_mixtral.TPAMixtralForCausalLM,
    "nemotron": tpa_nemotron.TPANemotronForCausalLM,
    "olmo": tpa_olmo.TPAOlmoForCausalLM,
    "olmo2": tpa_olmo2.TPAOlmo2ForCausalLM,
    "olmo3": tpa_olmo3.TPAOlmo3ForCausalLM,
    "olmoe": tpa_olmoe.TPAOlmoeForCausalLM,
    "phi": tpa_phi.TPAPhiForCausalLM,
    "phi3": tpa_phi3.TPAPhi3ForCausalLM,
    "phimoe": tpa_phimoe.TPAPhimoeForCausalLM,
    "qwen2": tpa_qwen2.TPAQwen2ForCausalLM,
    "qwen2_moe": tpa_qwen2_moe.TPAQwen2MoeForCausalLM,
    "qwen3": tpa_qwen3.TPAQwen3ForCausalLM,
    "qwen3_moe": tpa_qwen3_moe.TPAQwen3MoeForCausalLM,
    "seed_oss": tpa_seed_oss.TPASeedOssForCausalLM,
    "smollm3": tpa_smollm3.TPASmolLM3ForCausalLM,
    "solar_open": tpa_solar_open.TPASolarOpenForCausalLM,
    "stablelm": tpa_stablelm.TPAStableLmForCausalLM,
    "starcoder2": tpa_starcoder2.TPAStarcoder2ForCausalLM,
}
"""Converted models by the `model_type` of their source."""

for _causal_lm in CAUSAL_LMS.values():
    register(_causal_lm)

AutoConfig.register("tpa", legacy.TPAConfig, exist_ok=True)
AutoModelForCausalLM.register(legacy.TPAConfig, legacy.TPAForCausalLM, exist_ok=True)

__all__ = [
    "CAUSAL_LMS",
    "CLASSES",
    "AttentionNames",
    "Form",
    "Gauge",
    "KeyCache",
    "LayerShape",
    "PairOrder",
    "RowLayout",
    "TPAAttention",
    "TPAConfigMixin",
    "TPAModelMixin",
    "codes_of",
    "given_cache",
    "groups_of",
    "norm_epsilon",
    "norm_width",
    "normalised_together",
    "pair_table",
    "register",
    "sliding_window",
    "source_head_dim",
    "source_key_value_heads",
]
