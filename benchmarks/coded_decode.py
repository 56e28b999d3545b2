"""What prefill and a decoding step cost the host: operators, launches of kernels and time, models
side by side.

    python benchmarks/coded_decode.py recipes/embedded_model/model CONVERTED [--context 512]
    python benchmarks/coded_decode.py source absorbed:64 applied:256 latent:256 affine:1 coded:12.5

Models are directories, or kinds of random weights as in common/random_models.py, in the shape
`small`: a GPU's work is next to nothing in it. In `tiny`, in float32 and with few tokens, so is a
CPU's. Operators are those that PyTorch dispatches, views
counted apart: on a GPU, about the launches. Without a GPU the kernels of tpa-convert are launched
into the void, so that all that the host does for them is counted and timed but the driver's part;
with --backend reference they are not launched. The models take turns in one process, so that what
else the machine does slows all.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import driver  # noqa: E402

import tpa_convert.modeling  # noqa: E402, F401  (the Auto classes then know converted models)
from common.machine import device_name, versions  # noqa: E402
from common.random_models import SHAPES, build  # noqa: E402
from tpa_convert.forward.cached import cache_argument  # noqa: E402
from tpa_convert.kernels import (  # noqa: E402
    launch,
    launch_encode,
    launch_latent_shape,
    launch_products,
    launch_prompt,
    launch_rotation,
    launch_token,
)

KERNELS = {
    launch: ("split_kernel", "join_kernel"),
    launch_encode: ("encode_kernel",),
    launch_prompt: ("encode_kernel",),
    launch_rotation: ("rotate_kernel",),
    launch_token: ("encode_kernel",),
    launch_products: ("product_kernel", "projections_kernel"),
    launch_latent_shape: ("latent_weights_kernel", "latent_sums_kernel", "latent_join_kernel"),
}
LAUNCHES: Counter[str] = Counter()


class Void(CompiledKernel):
    """Stands for a kernel where there is no GPU, and for what Triton compiles of it; counts its
    launches."""

    def __init__(self, name: str, kernel: Any):
        self.name, self.module, self.src, self.kernel = name, None, None, ()
        same = kernel.kwargs["do_not_specialize"] or ()
        self.arg_names = kernel.arg_names
        self.params = [SimpleNamespace(do_not_specialize=x in same) for x in self.arg_names]
        self.function = self.packed_metadata = None
        self._run = self.count

    def count(self, *arguments: Any) -> None:
        LAUNCHES[self.name] += 1

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self

    def __call__(self, *arguments: Any, **named: Any) -> Void:
        self.count()
        return self


class NoDriver:
    """Of a GPU that is not there."""

    def get_current_stream(self, device: int | None) -> int:
        return 0


class Operators(TorchDispatchMode):
    """Counts operators by name, and views."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        (self.views if func.is_view else self.count)[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Decoder:
    """A model with a cache of `context` tokens of each of `batch` sequences."""

    def __init__(
        self, name: str, batch: int, context: int, dtype: torch.dtype, device: str, shape: str
    ):
        if Path(name).is_dir():
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
        else:
            model = build(shape, name, device).to(dtype)
        self.model = model
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator)
        self.tokens = tokens.to(device)
        self.layers = model.config.num_hidden_layers

    def prefill(self) -> None:
        output = self.model(input_ids=self.tokens, use_cache=True, logits_to_keep=1)
        self.cache = cache_argument(output)

    def step(self) -> None:
        """Adds a token; the text grows as texts do, for all models alike."""
        token = self.tokens[:, -1:]
        self.model(input_ids=token, use_cache=True, **self.cache)


def launch_into_the_void() -> None:
    """Puts what does nothing in the place of all kernels, and of Triton's driver."""
    driver.set_active(NoDriver())
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, Void(name, getattr(module, name)))


def seconds(run: Any) -> float:
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def operators(run: Any) -> Operators:
    LAUNCHES.clear()
    with Operators() as counted:
        run()
    return counted


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("models", nargs="+", help="the source, and what is made of it")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--context", type=int, default=512, help="tokens of each in the cache")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of random weights")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", choices=("triton", "reference"), default="triton")
    parser.add_argument("--operators", action="store_true", help="print the counts of each step")
    arguments = parser.parse_args()
    os.environ["TPA_CONVERT_BACKEND"] = arguments.backend
    if not GPU:
        launch_into_the_void()
    device, dtype = ("cuda" if GPU else "cpu"), getattr(torch, arguments.dtype)
    given = arguments.batch, arguments.context, dtype, device, arguments.shape
    decoders = [Decoder(name, *given) for name in arguments.models]
    print(
        f"{device_name()}, {versions()}, {arguments.dtype}, {arguments.batch} × {arguments.context}"
    )
    for part in ("prefill", "step"):
        runs = [getattr(decoder, part) for decoder in decoders]
        for run in runs:
            run()
        rounds = [[seconds(run) for run in runs] for _ in range(arguments.repeats)]
        ratio = [median(turn[0] / turn[i] for turn in rounds) for i in range(len(runs))]
        for i, (name, decoder) in enumerate(zip(arguments.models, decoders, strict=True)):
            counted = operators(runs[i])
            counts = counted.count.total(), counted.views.total(), LAUNCHES.total()
            said = (
                f"{number / decoder.layers:6.1f} {what}"
                for number, what in zip(counts, ("operators", "views", "launches"), strict=True)
            )
            print(
                f"{part:8} {name:40} {median(turn[i] for turn in rounds) * 1e3:8.2f} ms  "
                f"x{ratio[i]:.2f}  a layer: {', '.join(said)}"
            )
            if arguments.operators:
                print("   ", dict(counted.count.most_common()))
                print("    views:", dict(counted.views.most_common()))


if __name__ == "__main__":
    main()
