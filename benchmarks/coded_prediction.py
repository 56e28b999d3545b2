"""Values coded given the keys' codes (`tpa_convert.coding.prediction`), or by themselves.

    python benchmarks/coded_prediction.py FOLDER SmolLM2-135M-Instruct.Q4_1.gguf --data DATA

Small enough for a CPU. Rows are the package's own: components are encoded into bytes and decoded
from them inside the source's k_proj and v_proj. DATA is `coded_data.py`'s.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from coded_rows import Judge, collect
from machine import device_name, versions
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tpa_convert.coding import (
    Components,
    Quantiser,
    allocate_bits,
    class_means,
    class_offset,
    decode,
    design_quantiser,
    encode,
    fisher_metric,
    key_metric,
    pair_blocks,
    prediction,
    principal_components,
    spreads,
)

FREE = tuple(range(9))
SHRINKAGE = 0.2  # few tokens


class Part(NamedTuple):
    """Keys or values of one layer, fp64: components of the samples [N, n], class means, spreads."""

    components: Components
    samples: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, value: Tensor, sink: Tensor, metric: Tensor, blocks=None) -> Part:
        found = principal_components(torch.cov(value[~sink].mT), metric, blocks)
        samples = value @ found.feature.mT
        mean = class_means(samples, sink)
        return cls(found, samples, mean, spreads(samples, mean, found.importance))

    @property
    def energy(self) -> Tensor:
        return self.components.importance * self.spread.square()

    def coder(self, bits: Tensor) -> Coder:
        found = self.components
        quantiser, order = design_quantiser(self.spread, self.mean, found.importance, bits)
        offset = class_offset(found.gauge, self.mean, order)
        tensors = (found.feature[order], found.gauge[:, order], offset)
        return Coder(quantiser, order, *(tensor.float() for tensor in tensors))


class Coder(NamedTuple):
    """Components through bytes: see `Quantiser`."""

    quantiser: Quantiser
    order: Tensor
    feature: Tensor
    gauge: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers [..., n] as attended to, and the decoded components [..., c]."""
        rows = encode(x @ self.feature.mT, self.quantiser)
        found, label = decode(rows, self.quantiser)
        return found @ self.gauge.mT + self.offset[label], found


class Layer:
    """Parts of one layer, with values by themselves or given the keys."""

    def __init__(self, keys, values, sink: Tensor, prior_k: Tensor, prior_v: Tensor, blocks):
        (self.key, key_gradient), (self.value, value_gradient) = keys, values
        self.sink = sink
        metric = fisher_metric(key_gradient[~sink], prior_k, SHRINKAGE)
        self.metric_v = fisher_metric(value_gradient[~sink], prior_v, SHRINKAGE)
        self.k = Part.of(self.key.double(), sink, metric, blocks)
        self.v = Part.of(self.value.double(), sink, self.metric_v)
        self.prediction: Tensor | None = None

    def predict(self, bits: Tensor) -> None:
        """Values given the keys, which have these bits [n]."""
        coder = self.k.coder(bits)
        found = coder(self.key)[1].double()
        value = self.value.double()
        weight = prediction(found[~self.sink], value[~self.sink])
        self.v = Part.of(value - found @ weight, self.sink, self.metric_v)
        self.prediction = weight.float()


def bits_of(layers: list[Layer], share: float) -> Tensor:
    """Of all components from one budget, headers counted: int64 [layers, 2, n]."""
    energy = torch.stack([torch.stack((x.k.energy, x.v.energy)) for x in layers])
    budget = int(16 * share * energy.numel()) - 16 * len(layers)
    return allocate_bits(energy.flatten(), budget, FREE).view_as(energy)


def measure(judge: Judge, layers: list[Layer], share: float, given_keys: bool, name: str) -> None:
    start = time.perf_counter()
    bits = bits_of(layers, share)
    for _ in range(2 * given_keys):  # the bits of keys depend on what they say of the values
        for layer, (bits_k, _) in zip(layers, bits, strict=True):
            layer.predict(bits_k)
        bits = bits_of(layers, share)
    hooks = []
    for layer, own, (bits_k, bits_v) in zip(layers, judge.model.model.layers, bits, strict=True):
        if given_keys:
            layer.predict(bits_k)
        coders, told = (layer.k.coder(bits_k), layer.v.coder(bits_v)), {}

        def key_hook(_, __, x, coder=coders[0], told=told):
            x, told["keys"] = coder(x)
            return x

        def value_hook(_, __, x, coder=coders[1], told=told, weight=layer.prediction):
            expected = 0.0 if weight is None else told["keys"] @ weight
            return coder(x - expected)[0] + expected

        hooks.append(own.self_attn.k_proj.register_forward_hook(key_hook))
        hooks.append(own.self_attn.v_proj.register_forward_hook(value_hook))
    score = judge.score()
    for hook in hooks:
        hook.remove()
    split = bits.double().mean((0, 2)).tolist()
    seconds = time.perf_counter() - start
    print(
        f"| {name} | {100 * share} | {score} | {split[0]:.2f} : {split[1]:.2f} | {seconds:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("gguf")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--valid", type=int, default=1)
    parser.add_argument("--valid-length", type=int, default=448)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.folder, gguf_file=arguments.gguf, dtype=torch.float32
    )
    model = model.eval().requires_grad_(False)
    print(f"{device_name()}, {versions()}\n")
    run(model, arguments.data, arguments.calibration, arguments.valid, arguments.valid_length)


def run(model, data: Path, calibration: int, valid: int, valid_length: int) -> None:
    config = model.config
    groups, head_dim = config.num_key_value_heads, config.head_dim
    blocks = torch.from_numpy(np.load(data / "calibration.npy")[:calibration].astype(np.int64))
    with np.load(data / "valid.npz") as file:
        texts = {
            k: torch.from_numpy(x[:valid, :valid_length].astype(np.int64)) for k, x in file.items()
        }
    moments = load_file(data / "moments.safetensors")
    samples = collect(model, blocks, 2)
    judge = Judge(model, texts, 1)
    print("| values | % | ratio | KL | top-1 % | K : V bits | seconds |")
    print("|---" * 7 + "|")
    for key_blocks, share in ((1, 0.125), (4, 0.125), (1, 0.0625)):
        for given_keys in (False, True):
            layers = []
            for i, layer in enumerate(model.model.layers):
                keys, values = samples[i, "k"], samples[i, "v"]
                output = layer.self_attn.o_proj.weight.double().unflatten(1, (groups, -1, head_dim))
                metric = torch.block_diag(*torch.einsum("xgnd,xgne->gde", output, output))
                layers.append(
                    Layer(
                        (keys.value, keys.gradient), (values.value, values.gradient),
                        keys.position == 0,
                        key_metric(moments[f"layers.{i}.query_energy"].double()),
                        metric,
                        pair_blocks(groups, head_dim, key_blocks),
                    )
                )  # fmt: skip
            kind = "given the keys" if given_keys else "by themselves"
            measure(judge, layers, share, given_keys, f"{kind}, keys in {key_blocks} blocks")


if __name__ == "__main__":
    main()
