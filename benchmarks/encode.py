"""Coding of components on a GPU: one launch beside the same in PyTorch.

    python benchmarks/encode.py

What a step of training with rounding in the loop calls 60 times (30 layers, keys and values), with
and without gradients and the host's time included; and what a new token costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from common.kernel_timing import seconds
from common.machine import device_name, versions
from tpa_convert.kernels import CodeTables, encode, straight_through
from tpa_convert.kernels.encode_reference import encode_components

CALLS = 60


def tables_for(width: int) -> CodeTables:
    bits = torch.randint(1, 5, (width,), device="cuda").float()
    spread = torch.rand(width, device="cuda") + 0.1
    mean = torch.randn(2, width, device="cuda")
    reach = (torch.exp2(bits) - 1) / 2
    return CodeTables(mean, 3 * spread / torch.exp2(bits), spread, 1 / spread.square(), reach)


def milliseconds(call: Callable[[], object], calls: int = CALLS, repeats: int = 7) -> float:
    """Median of the time of `calls` calls one after another, host included."""
    times = []
    for repeat in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def table_rows(tokens: int, width: int) -> None:
    tables = tables_for(width)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    y = x.clone().requires_grad_()
    gradient = torch.randn_like(x)

    def step() -> None:
        straight_through(y, tables)[0].backward(gradient)

    for name, kernel, plain in (
        ("headers and codes", lambda: encode(x, tables), lambda: encode_components(x, tables)),
        ("straight through, forward", lambda: straight_through(x, tables), None),
        ("straight through, forward and backward", step, None),
    ):
        other = f"{milliseconds(plain):.2f}" if plain else ""
        alone = "" if kernel is step else f"{CALLS * 1e3 * seconds(lambda _, f=kernel: f(), 2):.2f}"
        print(f"| {name} | {tokens} | {width} | {milliseconds(kernel):.2f} | {alone} | {other} |")


def main() -> None:
    print(f"{device_name()}, {versions()}\n")
    print(f"| {CALLS} calls, ms | tokens | components | kernel | of it the GPU | PyTorch |")
    print("|---|---|---|---|---|---|")
    for tokens, width in ((16384, 100), (16384, 1024), (1, 100), (64, 1024)):
        table_rows(tokens, width)


if __name__ == "__main__":
    main()
