"""Qwen 2 and 2.5: Llama with biases on q, k and v only."""

from __future__ import annotations

from tpa_convert.families.family import Architecture

QWEN2 = Architecture(
    model_type="qwen2",
    attention_bias=True,
    attention_output_bias=False,
)
