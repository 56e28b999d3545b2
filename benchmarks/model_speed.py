"""Whole models of random weights: the source beside conversions of it, decoding and prefill.

    python benchmarks/model_speed.py --shape llama-1b --batch 1 16 --context 2048 32768 [--static]

Kinds of conversions are written as form:width, halves for keys and values: `absorbed:64`,
`applied:256`, `latent:256`, `affine:1` and `linear:2` (ranks). TPA_CONVERT_BACKEND=reference shows
them without kernels.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
from machine import device_name, versions
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tpa_convert.evaluation.sweep import sweep_speed
from tpa_convert.modeling import LayerShape
from tpa_convert.modeling.tpa_llama import TPALlamaConfig, TPALlamaForCausalLM

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
}


def layer_shape(kind: str, head_dim: int) -> LayerShape:
    name, number = kind.split(":")
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
    if kind == "source":
        config, family = LlamaConfig(**sizes), LlamaForCausalLM
    else:
        layers = asdict(layer_shape(kind, int(sizes["head_dim"])))
        config, family = TPALlamaConfig(**sizes, tpa_layers=layers), TPALlamaForCausalLM
    config.dtype = torch.bfloat16
    with torch.device(device):
        model = family(config).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model.to(device).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--kinds", nargs="+", default=["absorbed:64", "applied:256", "affine:1"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--context", nargs="+", type=int, default=[2048])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--static", action="store_true")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device_name()}, {versions()}, {given.shape}\n", flush=True)
    models = {kind: build(given.shape, kind, device) for kind in ("source", *given.kinds)}
    report = sweep_speed(
        models,
        tuple(given.batch),
        tuple(given.context),
        new_tokens=given.new_tokens,
        static=given.static,
    )
    Console(width=110).print(report)


if __name__ == "__main__":
    main()
