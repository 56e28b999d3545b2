"""Source models: which families are known, where their weights live, and how they are loaded."""

from __future__ import annotations

from tpa_convert.architectures.architecture import (
    Architecture,
    architecture_of,
    register_architecture,
)
from tpa_convert.architectures.llama import LLAMA
from tpa_convert.architectures.mistral import MISTRAL
from tpa_convert.architectures.phi3 import PHI3
from tpa_convert.architectures.qwen2 import QWEN2
from tpa_convert.architectures.source import (
    Source,
    SourceReference,
    load_source,
    read_source_config,
)

for _architecture in (LLAMA, MISTRAL, PHI3, QWEN2):
    register_architecture(_architecture)

__all__ = [
    "Architecture",
    "Source",
    "SourceReference",
    "architecture_of",
    "load_source",
    "read_source_config",
    "register_architecture",
]
