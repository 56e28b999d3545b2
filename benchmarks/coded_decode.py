"""Operators and milliseconds of prefill and of a decoding step, source and coded model side by
side.

    python benchmarks/coded_decode.py recipes/embedded_model/model CONVERTED [--context 512]

Operators are those that PyTorch dispatches and that are no views: on a GPU, about the launches.
The models take turns in one process, so that what else the machine does slows both.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from statistics import median
from typing import Any

import torch
from machine import device_name, versions
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import tpa_convert.modeling  # noqa: F401  (the Auto classes then know converted models)
from tpa_convert.forward.cached import cache_argument


class Operators(TorchDispatchMode):
    """Counts operators by name, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Decoder:
    """A model with a cache of `context` tokens."""

    def __init__(self, path: str, context: int, dtype: torch.dtype, device: str):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.model = model.to(device).eval()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.config.vocab_size, (1, context), generator=generator)
        self.tokens = tokens.to(device)
        self.layers = model.config.num_hidden_layers

    def prefill(self) -> None:
        output = self.model(input_ids=self.tokens, use_cache=True, logits_to_keep=1)
        self.cache = cache_argument(output)

    def step(self) -> None:
        """Adds a token, and takes it out again: all steps see the same context."""
        token = self.tokens[:, -1:]
        self.model(input_ids=token, use_cache=True, **self.cache)
        next(iter(self.cache.values())).crop(-1)


def seconds(run: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def operators(run: Any) -> Counter[str]:
    with Operators() as counted:
        run()
    return counted.count


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("models", nargs="+", help="the source, and what is made of it")
    parser.add_argument("--context", type=int, default=512, help="tokens of the cache")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--operators", action="store_true", help="print the counts of each step")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, arguments.dtype)
    decoders = [Decoder(path, arguments.context, dtype, device) for path in arguments.models]
    print(f"{device_name()}, {versions()}, {arguments.dtype}, {arguments.context} tokens")
    for part in ("prefill", "step"):
        runs = [getattr(decoder, part) for decoder in decoders]
        for run in runs:
            run()
        rounds = [[seconds(run) for run in runs] for _ in range(arguments.repeats)]
        ratio = [median(turn[0] / turn[i] for turn in rounds) for i in range(len(runs))]
        for i, (path, decoder) in enumerate(zip(arguments.models, decoders, strict=True)):
            counts = operators(runs[i])
            print(
                f"{part:8} {path:40} {median(turn[i] for turn in rounds) * 1e3:8.2f} ms  "
                f"x{ratio[i]:.2f}  {counts.total():5} operators, "
                f"{counts.total() / decoder.layers:.0f} a layer"
            )
            if arguments.operators:
                print("   ", dict(counts.most_common()))


if __name__ == "__main__":
    main()
