"""Which model families are known, and what differs between them."""

from __future__ import annotations

from tpa_convert.families.family import (
    Family,
    add_family,
    family_of,
    is_tpa,
    register_family,
)
from tpa_convert.modeling import CAUSAL_LMS

_HEAD_NORM = "a LayerNorm of queries and keys"
_BIDIRECTIONAL = "attention to later tokens"
_CLIPPED = "queries, keys and values of limited size"

FAMILIES = (
    Family("llama", "Llama 2, 3, 3.1, 3.2, 3.3"),
    Family("mistral", "Mistral"),
    Family("mixtral", "Mixtral"),
    Family("qwen2", "Qwen 2, 2.5"),
    Family("qwen2_moe", "Qwen 2 with experts"),
    Family("qwen3", "Qwen 3", key_norm=True),
    Family("qwen3_moe", "Qwen 3 with experts", key_norm=True),
    Family("gemma", "Gemma", refused={"use_bidirectional_attention": _BIDIRECTIONAL}),
    Family("gemma2", "Gemma 2", refused={"use_bidirectional_attention": _BIDIRECTIONAL}),
    Family(
        "gemma3_text",
        "Gemma 3 (text)",
        key_norm=True,
        refused={"use_bidirectional_attention": _BIDIRECTIONAL},
    ),
    Family("phi", "Phi-1, 1.5, 2", refused={"qk_layernorm": _HEAD_NORM}),
    Family("phi3", "Phi-3, Phi-4"),
    Family("olmo", "OLMo", refused={"clip_qkv": _CLIPPED}),
    Family("olmo2", "OLMo 2", key_norm="all"),
    Family("olmo3", "OLMo 3", key_norm="all"),
    Family("olmoe", "OLMoE", key_norm="all", refused={"clip_qkv": _CLIPPED}),
    Family("granite", "Granite"),
    Family("granitemoe", "Granite with experts"),
    Family("glm4", "GLM-4"),
    Family("ministral3", "Ministral 3"),
    Family("seed_oss", "Seed-OSS"),
    Family("cohere", "Cohere (Command R, Aya)", refused={"use_qk_norm": _HEAD_NORM}),
    Family("cohere2", "Cohere 2 (Command R7B, A)"),
    Family("stablelm", "StableLM", refused={"qk_layernorm": _HEAD_NORM}),
    Family("gpt_neox", "GPT-NeoX, Pythia"),
    Family("smollm3", "SmolLM3"),
    Family("starcoder2", "StarCoder2"),
)
for _family in FAMILIES:
    add_family(_family)

__all__ = [
    "CAUSAL_LMS",
    "FAMILIES",
    "Family",
    "add_family",
    "family_of",
    "is_tpa",
    "register_family",
]
