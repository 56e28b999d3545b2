"""Whole models of random weights: the source beside conversions of it, decoding and prefill.

    python benchmarks/model_speed.py --shape llama-1b --batch 1 16 --context 2048 32768 [--static]

common/random_models.py says how kinds of conversions are written. TPA_CONVERT_BACKEND=reference
shows them without kernels.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from common.machine import device_name, versions
from common.random_models import SHAPES, build
from tpa_convert.evaluation.sweep import sweep_speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--kinds", nargs="+", default=["coded:12.5", "latent:256", "applied:256"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--context", nargs="+", type=int, default=[2048])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument(
        "--repeats", type=int, default=3, help="how often each is measured; medians count"
    )
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
        repeats=given.repeats,
        static=given.static,
    )
    Console(width=110).print(report)


if __name__ == "__main__":
    main()
