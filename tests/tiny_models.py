"""Tiny random models of families that differ in everything but the interface."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    ApertusConfig,
    ArceeConfig,
    Cohere2Config,
    CohereConfig,
    CwmConfig,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    FlexOlmoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    MiniMaxM2Config,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    SolarOpenConfig,
    StableLmConfig,
    Starcoder2Config,
)

from tests.conftest import make_tiny_llama

WINDOW = 8
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # as in conftest
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]


def random_model(family: type[PreTrainedModel], config: Any, seed: int = 0) -> Any:
    """In fp32 and eval mode, with norms that are no identity and biases that are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family(config)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data += torch.empty_like(parameter).uniform_(-0.5, 0.5)
            elif name.endswith("bias"):
                parameter.data.normal_(std=0.2)
    return model.eval().requires_grad_(False)


MULTI_HEAD = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CONFIGS: dict[str, Callable[[], Any]] = {
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "cohere2": lambda: Cohere2Config(
        **SIZES, logit_scale=0.25, sliding_window=WINDOW, layer_types=GEMMA_LAYERS
    ),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **SIZES,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=GEMMA_LAYERS,
        query_pre_attn_scalar=10,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=2.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=GEMMA_LAYERS,
        final_logit_softcapping=2.0,
    ),
    "glm4": lambda: Glm4Config(**SIZES, head_dim=8),
    "gpt_neox": lambda: GPTNeoXConfig(**MULTI_HEAD, rotary_pct=0.5),
    "granite": lambda: GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        residual_multiplier=0.3,
        attention_multiplier=0.5,
        logits_scaling=5.0,
    ),
    "granitemoe": lambda: GraniteMoeConfig(
        **SIZES | {"intermediate_size": 16},
        num_local_experts=4,
        num_experts_per_tok=2,
        attention_multiplier=0.5,
    ),
    "ministral3": lambda: Ministral3Config(**SIZES, head_dim=8, sliding_window=WINDOW),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=8, sliding_window=WINDOW),
    "mixtral": lambda: MixtralConfig(
        **SIZES | {"intermediate_size": 16},
        head_dim=8,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "olmo": lambda: OlmoConfig(**SIZES),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "olmo3": lambda: Olmo3Config(**SIZES, sliding_window=WINDOW, layer_types=GEMMA_LAYERS),
    "olmoe": lambda: OlmoeConfig(
        **SIZES | {"intermediate_size": 16}, num_experts=4, num_experts_per_tok=2
    ),
    "apertus": lambda: ApertusConfig(**SIZES),
    "arcee": lambda: ArceeConfig(**SIZES),
    "cwm": lambda: CwmConfig(**SIZES, head_dim=8, sliding_window=WINDOW, layer_types=GEMMA_LAYERS),
    "dots1": lambda: Dots1Config(
        **SIZES | {"layer_types": GEMMA_LAYERS, "sliding_window": WINDOW},
        **ROUTED,
        first_k_dense_replace=1,
        n_shared_experts=1,
    ),
    "ernie4_5": lambda: Ernie4_5Config(**SIZES, head_dim=8, use_bias=True),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(
        **SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=16
    ),
    "exaone4": lambda: Exaone4Config(
        **SIZES, sliding_window=None, layer_types=["full_attention"] * 3
    ),
    "flex_olmo": lambda: FlexOlmoConfig(
        **SIZES | {"intermediate_size": 16}, num_experts=4, num_experts_per_tok=2
    ),
    "glm": lambda: GlmConfig(**SIZES, head_dim=8),
    "glm4_moe": lambda: Glm4MoeConfig(**SIZES, **ROUTED, head_dim=8, use_qk_norm=True),
    "granitemoeshared": lambda: GraniteMoeSharedConfig(
        **SIZES | {"intermediate_size": 16},
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        attention_multiplier=0.5,
    ),
    "minimax_m2": lambda: MiniMaxM2Config(
        **SIZES | {"intermediate_size": 16},
        head_dim=8,
        rotary_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "ministral": lambda: MinistralConfig(
        **SIZES, head_dim=8, sliding_window=WINDOW, layer_types=GEMMA_LAYERS
    ),
    "nemotron": lambda: NemotronConfig(**SIZES),
    "phimoe": lambda: PhimoeConfig(
        **SIZES | {"intermediate_size": 16}, num_local_experts=4, num_experts_per_tok=2
    ),
    "solar_open": lambda: SolarOpenConfig(**SIZES, **ROUTED, head_dim=8),
    "phi": lambda: PhiConfig(**SIZES),
    "phi3": lambda: Phi3Config(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES,
        **EXPERTS,
        shared_expert_intermediate_size=16,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=GEMMA_LAYERS,
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8),
    "seed_oss": lambda: SeedOssConfig(**SIZES, head_dim=8),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    "stablelm": lambda: StableLmConfig(**SIZES, use_qkv_bias=True),
    "starcoder2": lambda: Starcoder2Config(**SIZES, sliding_window=WINDOW),
}


def _model(name: str, seed: int = 0) -> Any:
    config = CONFIGS[name]()
    return random_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, seed)


MODELS: dict[str, Callable[..., Any]] = {
    "llama": lambda seed=0: make_tiny_llama(num_hidden_layers=3, seed=seed),
    **{name: partial(_model, name) for name in CONFIGS},
}
"""Each takes a seed: 3 layers, hidden size 32, vocabulary 128."""

BUILT_LIKE = {
    "apertus": "qwen3",
    "arcee": "llama",
    "cwm": "qwen2_moe",
    "dots1": "qwen3_moe",
    "ernie4_5": "cohere",
    "ernie4_5_moe": "cohere",
    "exaone4": "qwen3",
    "flex_olmo": "olmoe",
    "glm": "glm4",
    "granitemoeshared": "granitemoe",
    "ministral": "ministral3",
    "nemotron": "phi",
    "phimoe": "mixtral",
    "solar_open": "mixtral",
}
"""Families whose attention is that of another one here: tests that train leave them to it."""

SELF_ATTENTION = [name for name in MODELS if name != "gpt_neox"]
"""Those whose attention has the name that most give it."""
