"""Mistral 7B from v0.2 on, Mistral Nemo, Zephyr: Llama without biases."""

from __future__ import annotations

from tpa_convert.families.family import Architecture

MISTRAL = Architecture(
    model_type="mistral",
    attention_bias=False,
    attention_output_bias=False,
)
