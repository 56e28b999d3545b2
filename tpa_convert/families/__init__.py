"""Which model families are known, and what differs between them."""

from __future__ import annotations

from tpa_convert.families.family import (
    Family,
    add_family,
    experts_of,
    family_of,
    is_tpa,
    register_family,
)
from tpa_convert.modeling import CAUSAL_LMS

_HEAD_NORM = "a LayerNorm of queries and keys"
_BIDIRECTIONAL = "attention to later tokens"
_HYBRID = "layers without rotation between those with windows"
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
    Family("phimoe", "Phi-3.5 with experts"),
    Family("olmo", "OLMo", refused={"clip_qkv": _CLIPPED}),
    Family("olmo2", "OLMo 2", key_norm="all"),
    Family("olmo3", "OLMo 3", key_norm="all"),
    Family("olmoe", "OLMoE", key_norm="all", refused={"clip_qkv": _CLIPPED}),
    Family("flex_olmo", "FlexOLMo", key_norm="all"),
    Family("granite", "Granite"),
    Family("granitemoe", "Granite with experts"),
    Family("granitemoeshared", "Granite with shared experts"),
    Family("glm", "GLM-4 (9B)"),
    Family("glm4", "GLM-4 (0414)"),
    Family("glm4_moe", "GLM-4.5, 4.6", key_norm=True, key_norm_if="use_qk_norm"),
    Family("ministral", "Ministral"),
    Family("ministral3", "Ministral 3"),
    Family("seed_oss", "Seed-OSS"),
    Family("minimax_m2", "MiniMax-M2", key_norm="all"),
    Family("apertus", "Apertus", key_norm=True),
    Family("arcee", "Arcee (AFM)"),
    Family("cwm", "Code World Model"),
    Family("dots1", "dots.llm1", key_norm=True),
    Family("ernie4_5", "Ernie 4.5"),
    Family("ernie4_5_moe", "Ernie 4.5 with experts"),
    Family("exaone4", "EXAONE 4", key_norm=True, refused={"sliding_window": _HYBRID}),
    Family("nemotron", "Nemotron, Minitron"),
    Family("solar_open", "Solar Open"),
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
    "experts_of",
    "family_of",
    "is_tpa",
    "register_family",
]
