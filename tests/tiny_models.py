"""Tiny random models of families that differ in everything but the interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
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


MODELS: dict[str, Callable[..., Any]] = {
    "llama": lambda seed=0: make_tiny_llama(num_hidden_layers=3, seed=seed),
    "qwen3": lambda seed=0: random_model(Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8), seed),
    "gemma3": lambda seed=0: random_model(
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=GEMMA_LAYERS,
            final_logit_softcapping=2.0,
        ),
        seed,
    ),
    "granite": lambda seed=0: random_model(
        GraniteForCausalLM,
        GraniteConfig(
            **SIZES, embedding_multiplier=3.0, residual_multiplier=0.3, logits_scaling=5.0
        ),
        seed,
    ),
    "cohere": lambda seed=0: random_model(
        CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25), seed
    ),
    "mistral": lambda seed=0: random_model(
        MistralForCausalLM, MistralConfig(**SIZES, head_dim=8, sliding_window=WINDOW), seed
    ),
    "phi": lambda seed=0: random_model(PhiForCausalLM, PhiConfig(**SIZES), seed),
    "phi3": lambda seed=0: random_model(Phi3ForCausalLM, Phi3Config(**SIZES), seed),
    "qwen2": lambda seed=0: random_model(Qwen2ForCausalLM, Qwen2Config(**SIZES), seed),
}
"""Each takes a seed: 3 layers, hidden size 32, vocabulary 128."""
