"""Llama 1 to 3, and the many models that use its code (SmolLM, TinyLlama, Yi, ...)."""

from __future__ import annotations

from tpa_convert.families.family import Architecture

LLAMA = Architecture(model_type="llama")
