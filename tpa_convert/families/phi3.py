"""Phi-3 (the long-context models) and Phi-4: Llama with q, k, v and gate, up stacked."""

from __future__ import annotations

from tpa_convert.families.family import Architecture

PHI3 = Architecture(
    model_type="phi3",
    fused={
        "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    },
    attention_bias=False,
    attention_output_bias=False,
)
