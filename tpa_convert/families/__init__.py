"""Which model families are known, and what differs between them."""

from __future__ import annotations

from tpa_convert.families.family import (
    Family,
    add_family,
    family_of,
    is_tpa,
    register_family,
)
from tpa_convert.modeling.tpa_gemma3_text import TPAGemma3ForCausalLM
from tpa_convert.modeling.tpa_llama import TPALlamaForCausalLM
from tpa_convert.modeling.tpa_mistral import TPAMistralForCausalLM
from tpa_convert.modeling.tpa_phi3 import TPAPhi3ForCausalLM
from tpa_convert.modeling.tpa_qwen2 import TPAQwen2ForCausalLM
from tpa_convert.modeling.tpa_qwen3 import TPAQwen3ForCausalLM

FAMILIES = (
    Family("llama", TPALlamaForCausalLM),
    Family("mistral", TPAMistralForCausalLM),
    Family("qwen2", TPAQwen2ForCausalLM),
    Family("phi3", TPAPhi3ForCausalLM),
    Family("qwen3", TPAQwen3ForCausalLM, key_norm=True),
    Family("gemma3_text", TPAGemma3ForCausalLM, key_norm=True),
)
for _family in FAMILIES:
    add_family(_family)

__all__ = [
    "FAMILIES",
    "Family",
    "add_family",
    "family_of",
    "is_tpa",
    "register_family",
]
