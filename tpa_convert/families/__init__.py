"""Which model families are known, and what differs between them."""

from __future__ import annotations

from tpa_convert.families.family import (
    Architecture,
    architecture_of,
    register_architecture,
)
from tpa_convert.families.llama import LLAMA
from tpa_convert.families.mistral import MISTRAL
from tpa_convert.families.phi3 import PHI3
from tpa_convert.families.qwen2 import QWEN2

for _architecture in (LLAMA, MISTRAL, PHI3, QWEN2):
    register_architecture(_architecture)

__all__ = ["Architecture", "architecture_of", "register_architecture"]
