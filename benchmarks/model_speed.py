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
    parser.add_argument(
        "--points", nargs="+", default=[], help="as 16x32768, in the place of --batch and --context"
    )
    parser.add_argument("--fill", action="store_true", help="also the largest batch that decodes")
    given = parser.parse_args()
    points = [tuple(map(int, point.split("x"))) for point in given.points]
    sweeps = [((b,), (c,)) for b, c in points] or [(tuple(given.batch), tuple(given.context))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device_name()}, {versions()}, {given.shape}\n", flush=True)
    models = {kind: build(given.shape, kind, device) for kind in ("source", *given.kinds)}
    for batches, contexts in sweeps:
        report = sweep_speed(
            models,
            batches,
            contexts,
            new_tokens=given.new_tokens,
            repeats=given.repeats,
            static=given.static,
            fill=given.fill,
        )
        Console(width=110).print(report)


if __name__ == "__main__":
    main()
