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
    Family("llama"),
    Family("mistral"),
    Family("mixtral"),
    Family("qwen2"),
    Family("qwen2_moe"),
    Family("qwen3", key_norm=True),
    Family("qwen3_moe", key_norm=True),
    Family("gemma", refused={"use_bidirectional_attention": _BIDIRECTIONAL}),
    Family("gemma2", refused={"use_bidirectional_attention": _BIDIRECTIONAL}),
    Family("gemma3_text", key_norm=True, refused={"use_bidirectional_attention": _BIDIRECTIONAL}),
    Family("phi", refused={"qk_layernorm": _HEAD_NORM}),
    Family("phi3"),
    Family("olmo", refused={"clip_qkv": _CLIPPED}),
    Family("olmo2", key_norm="all"),
    Family("olmo3", key_norm="all"),
    Family("olmoe", key_norm="all", refused={"clip_qkv": _CLIPPED}),
    Family("granite"),
    Family("granitemoe"),
    Family("glm4"),
    Family("ministral3"),
    Family("seed_oss"),
    Family("cohere", refused={"use_qk_norm": _HEAD_NORM}),
    Family("cohere2"),
    Family("stablelm", refused={"qk_layernorm": _HEAD_NORM}),
    Family("gpt_neox"),
    Family("smollm3"),
    Family("starcoder2"),
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
