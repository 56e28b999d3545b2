"""Whole models of random weights: a source, and conversions of it.

Kinds of conversions are written as form:width, halves for keys and values: `absorbed:64`,
`applied:256`, `latent:256`, `affine:1` and `linear:2` (ranks); `coded:12.5` has rows of codes in
that percentage of the source's bytes. `qwen3-` in front, also of `source`, makes them of Qwen 3's
family, which normalises keys.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from tpa_convert.modeling import CAUSAL_LMS, LayerShape
from tpa_convert.modeling.tpa_configuration import codes_of
from tpa_convert.plans.coded import ALIGN, ALIGN_WIDE, WIDE_ROW, default_blocks

SHARED = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 1 << 18}
SHAPES = {
    "llama-1b": {
        **SHARED,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-8b-8-layers": {
        **SHARED,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 8,
        "head_dim": 128,
    },
    "small": {  # the host is the limit
        **SHARED,
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "head_dim": 64,
    },
    "tiny": {  # and where a CPU does the work of the device
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1 << 18,
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "head_dim": 32,
    },
}


NORMALISED = "qwen3-"
FAMILIES: dict[bool, Any] = {
    False: (LlamaForCausalLM, CAUSAL_LMS["llama"]),
    True: (Qwen3ForCausalLM, CAUSAL_LMS["qwen3"]),
}

# Of the numbers of keys and values, the share of components that have so many bits at 12.5 %, much
# as conversions choose them: 1.5 bits for each number of the keys, 2.5 for each of the values.
KEY_BITS = {4: 0.15, 2: 0.36, 1: 0.18}
VALUE_BITS = {4: 0.27, 3: 0.2, 2: 0.4}


def coded_shape(percent: float, groups: int, head_dim: int) -> LayerShape:
    """Rows in the blocks of rotary pairs that conversions take, values predicted from keys."""
    width, scale = groups * head_dim, percent / 12.5
    blocks = default_blocks({"num_key_value_heads": groups, "head_dim": head_dim})
    align = ALIGN_WIDE if percent / 100 * 2 * width >= WIDE_ROW else ALIGN
    together = 2 * align  # codes of 4 bits in bytes that are not padded, as conversions choose them
    while True:  # padding and headers are part of the bytes
        keys, values = (
            [(n, together * round(scale * share * of / together)) for n, share in shares.items()]
            for shares, of in ((KEY_BITS, width // blocks), (VALUE_BITS, width))
        )
        shape = _coded_shape(groups, blocks, keys, values, align)
        if shape.cached_bytes(groups) <= percent / 100 * 4 * width:
            return shape
        scale *= 0.98


def _coded_shape(
    groups: int,
    blocks: int,
    keys: list[tuple[int, int]],
    values: list[tuple[int, int]],
    align: int,
) -> LayerShape:
    return LayerShape(
        form="static",
        key_gauge="applied",
        value_gauge="applied",
        rank_k=groups,
        rank_v=groups,
        width_k=blocks * sum(count for _, count in keys),
        width_v=sum(count for _, count in values),
        key_cache="latent",
        key_codes=codes_of([keys] * blocks),
        value_codes=codes_of([values]),
        row_align=align,
        predict_values=True,
    )


def layer_shape(kind: str, groups: int, head_dim: int) -> LayerShape:
    name, number = kind.split(":")
    if name == "coded":
        return coded_shape(float(number), groups, head_dim)
    size = int(number)
    if name in ("affine", "linear"):
        width = size * head_dim
        gauge = "none" if name == "linear" else "applied"
        return LayerShape(name, gauge, gauge, size, size, width, width)  # type: ignore[arg-type]
    rank = -(-size // head_dim)
    if name == "latent":
        return LayerShape("static", "applied", "applied", rank, rank, size, size, "latent")
    return LayerShape("static", name, name, rank, rank, size, size)  # type: ignore[arg-type]


def build(shape: str, kind: str, device: str) -> PreTrainedModel:
    sizes = SHAPES[shape]
    normalised = kind.startswith(NORMALISED)
    kind = kind.removeprefix(NORMALISED)
    source, converted = FAMILIES[normalised]
    if kind == "source":
        family, config = source, source.config_class(**sizes)
    else:
        heads = int(sizes["num_key_value_heads"]), int(sizes["head_dim"])
        layers = asdict(replace(layer_shape(kind, *heads), key_norm=normalised))
        family, config = converted, converted.config_class(**sizes, tpa_layers=layers)
    config.dtype = torch.bfloat16
    with torch.device(device):
        model = family(config).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model.to(device).eval().requires_grad_(False)
