"""Which model families are known, and what differs between them."""

from __future__ import annotations

from tpa_convert.families.family import (
    Architecture,
    architecture_of,
    is_tpa,
    register_architecture,
    register_family,
)
from tpa_convert.modeling.tpa_gemma3_text import TPAGemma3ForCausalLM
from tpa_convert.modeling.tpa_llama import TPALlamaForCausalLM
from tpa_convert.modeling.tpa_mistral import TPAMistralForCausalLM
from tpa_convert.modeling.tpa_phi3 import TPAPhi3ForCausalLM
from tpa_convert.modeling.tpa_qwen2 import TPAQwen2ForCausalLM
from tpa_convert.modeling.tpa_qwen3 import TPAQwen3ForCausalLM

FAMILIES = (
    Architecture("llama", TPALlamaForCausalLM),
    Architecture("mistral", TPAMistralForCausalLM),
    Architecture("qwen2", TPAQwen2ForCausalLM),
    Architecture("phi3", TPAPhi3ForCausalLM),
    Architecture("qwen3", TPAQwen3ForCausalLM, key_norm=True),
    Architecture("gemma3_text", TPAGemma3ForCausalLM, key_norm=True),
)
for _architecture in FAMILIES:
    register_architecture(_architecture)

__all__ = [
    "FAMILIES",
    "Architecture",
    "architecture_of",
    "is_tpa",
    "register_architecture",
    "register_family",
]
