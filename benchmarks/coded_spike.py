"""Quality of coded caches on SmolLM2-135M-Instruct: one table row a variant.

    python benchmarks/coded_data.py SmolLM2-135M-Instruct.Q4_1.gguf healing-train.jsonl.xz \\
        healing-valid.jsonl.xz DATA
    python benchmarks/coded_spike.py FOLDER SmolLM2-135M-Instruct.Q4_1.gguf --data DATA base levels

FOLDER holds the GGUF file. Groups of variants are the functions named `group_*`. The column
"expected KL" is half the squared error in the Fisher metric on the calibration text.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from coded_baselines import group_baselines  # noqa: F401
from coded_heal import group_heal, group_refit  # noqa: F401
from coded_rows import (
    Judge,
    Row,
    classes,
    coder,
    collect,
    design,
    pair_blocks,
    replaced,
    rotary,
    rotate,
    transform,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tpa_convert.coding import allocate_bits, share_rows
from tpa_convert.coding.allocation import remaining_error

FREE = tuple(range(9))
HEADER_BITS = 8  # of each row
SHARES = (0.25, 0.1875, 0.125, 0.0625)
LEVEL_SETS = (
    (0, 1, 2, 3, 4, 6, 8), (0, 1, 2, 3, 4, 6), (0, 1, 2, 3, 4, 8), (0, 1, 2, 4, 8), (0, 2, 4, 8),
)  # fmt: skip


class Bench:
    def __init__(self, model, data: Path, calibration: int, valid: int, length: int, batch: int):
        self.model, self.config = model, model.config
        self.device = next(model.parameters()).device
        blocks = torch.from_numpy(np.load(data / "calibration.npy").astype(np.int64))
        self.blocks = blocks[:calibration, :length]
        with np.load(data / "valid.npz") as texts:
            self.texts = {
                name: torch.from_numpy(ids[:valid].astype(np.int64))[:, : 2 * length]
                for name, ids in texts.items()
            }
        self.head_dim = self.config.head_dim
        self.prepared = cache(self._prepared)
        self.stride = 5  # of the tokens that steps are fitted to
        self.samples = collect(model, self.blocks, batch)
        self.judge = Judge(model, self.texts, batch)
        path = data / "moments.safetensors"
        self.moments = {k: v.double() for k, v in load_file(path, device=str(self.device)).items()}
        path = data / "train.npy"
        if path.exists():
            self.train = torch.from_numpy(np.load(path).astype(np.int64))
        self.n = next(iter(self.samples.values())).value.shape[1]

    def metric(self, part, kind: str):
        """Of the error of one token's numbers [n, n]."""
        layer, name = part
        samples = self.samples[part]
        if kind == "pca":
            return torch.eye(self.n, dtype=torch.float64, device=self.device)
        if kind.startswith("fisher"):
            g = samples.gradient[samples.position > 0].double()
            fisher, prior = g.mT @ g / len(g), self.metric(part, "weights")
            shrink = float(kind[6:] or 0.01)
            return (1 - shrink) * fisher + shrink * prior * (fisher.trace() / prior.trace())
        if name == "k":  # heads' query energies, both halves
            energy = self.moments[f"layers.{layer}.query_energy"]
            return energy.repeat(1, 2).flatten().diag()
        o = self.model.model.layers[layer].self_attn.o_proj.weight.double()
        groups = self.config.num_key_value_heads
        o = o.unflatten(1, (groups, -1, self.head_dim))
        return torch.block_diag(*torch.einsum("xgnd,xgne->gde", o, o))

    def _prepared(
        self, part, kind="latent", blocks=1, metric="fisher", count=2, kmeans=0, weighted=True
    ):
        """Transform, components of the samples, class means."""
        samples = self.samples[part]
        rotated = kind == "rotated" and part[1] == "k"
        value = samples.value
        if rotated:
            value = rotate(value, rotary(self.model, samples.position))
        rest = samples.position > 0
        g = self.metric(part, metric)
        x = value[rest].double()
        weight = torch.ones_like(x[:, 0])
        if weighted:
            gradient = samples.gradient[rest].double()
            weight = (gradient @ torch.linalg.pinv(g) * gradient).sum(-1)
        weight = weight / weight.sum()
        mean = weight @ x
        covariance = (x - mean).mT @ ((x - mean) * weight[:, None])
        count_of = blocks if part[1] == "k" else 1
        if rotated:
            count_of = self.head_dim // 2
            # the gradient of a rotated key is the rotated gradient
            if metric.startswith("fisher"):
                r = rotate(samples.gradient, rotary(self.model, samples.position))[rest].double()
                g = r.mT @ r / len(r)
        t = transform(covariance, g, pair_blocks(self.n, self.head_dim, count_of), rotated)
        y = value @ t.encode.mT
        mean = classes(y, samples.position, count, kmeans)
        y = y[:: self.stride]
        energy = design(t, y, mean, torch.zeros_like(y[0], dtype=torch.long), "none", 0).energy[0]
        return t, y, mean, energy

    def rows(
        self,
        share=0.125,
        levels=FREE,
        split=None,
        by_layer=False,
        scale="rms search",
        rounds=0,
        tables=False,
        header=HEADER_BITS,
        layer_weight=None,
        **options,
    ) -> dict[tuple, Row]:
        """A row of each part. `split`: bits a component of keys and values; None is free."""
        parts = list(self.samples)
        prepared = {part: self.prepared(part, **options) for part in parts}
        energy = torch.stack(
            [prepared[part][3] * (layer_weight[part] if layer_weight else 1.0) for part in parts]
        )
        bits = torch.empty_like(energy, dtype=torch.long)
        budget = 16 * share * self.n - header  # of a part
        if split:
            for i, part in enumerate(parts):
                of_part = 16 * share * self.n * 2 * split[part[1] == "v"] / sum(split) - header
                bits[i] = allocate_bits(energy[i], of_part, levels)
        elif by_layer:
            for i in range(0, len(parts), 2):
                bits[i : i + 2] = allocate_bits(
                    energy[i : i + 2].flatten(), 2 * budget, levels
                ).view(2, -1)
        else:
            bits = allocate_bits(energy.flatten(), len(parts) * budget, levels).view_as(bits)
        return {
            part: design(*prepared[part][:3], bits[i], scale, rounds, tables)
            for i, part in enumerate(parts)
        }

    def measure(self, name: str, rows=None, coders=None, **options) -> None:
        start = time.perf_counter()
        extra = ""
        if coders is None:
            rows = rows or self.rows(**options)
            coders = {part: coder(row, self.model) for part, row in rows.items()}
            bits = sum(
                int(row.bits.sum()) + options.get("header", HEADER_BITS) for row in rows.values()
            )
            keys = sum(int(row.bits.sum()) for part, row in rows.items() if part[1] == "k")
            share = bits / (16 * self.n * len(rows))
            expected = 0.0
            for part, row in rows.items():
                y = self.prepared(part, **{k: v for k, v in options.items() if k in PREPARED})[1]
                expected += 0.5 * (row.quantise(y) - y).square().sum(-1).mean().item()
            kv = keys / (self.n * len(rows) / 2), (bits - keys) / (self.n * len(rows) / 2)
            extra = f"{expected:.3f} | {kv[0]:.2f} : {kv[1]:.2f}"
        else:
            share = options["share"]
            extra = "| "
        with replaced(self.model, coders):
            score = self.judge.score()
        seconds = time.perf_counter() - start
        print(f"| {name} | {100 * share:.2f} | {score} | {extra} | {seconds:.1f} |", flush=True)


PREPARED = ("kind", "blocks", "metric", "count", "kmeans", "weighted")


def group_base(bench: Bench) -> None:
    for share in SHARES:
        bench.measure("latent, fisher, all free", share=share)


def group_metric(bench: Bench) -> None:
    for split in ((1.5, 2.5), (2, 2)):
        bench.measure(f"latent, w and M, {split}", metric="weights", split=split)
        bench.measure(f"latent, fisher, {split}", split=split)
    bench.measure("latent, fisher, each layer alike", by_layer=True)
    bench.measure("latent, fisher, tokens alike", weighted=False)
    for shrink in ("0.001", "0.1", "0.3"):
        bench.measure(f"latent, fisher, shrunk by {shrink}", metric="fisher" + shrink)
    bench.measure("latent, pca, (2, 2)", metric="pca", split=(2, 2))


def group_levels(bench: Bench) -> None:
    for levels in (
        (0, 1, 2, 4, 8),
        (0, 1, 2, 3, 4),
        (0, 1, 2, 3, 4, 8),
        (0, 2, 4, 8),
        (0, 2, 3, 4),
        (0, 4),
    ):
        bench.measure(f"levels {levels}", levels=levels)
    bench.measure("levels (0, 1, 2, 4, 8), 25 %", levels=(0, 1, 2, 4, 8), share=0.25)


def group_quantiser(bench: Bench) -> None:
    for tables in (False, True):
        for scale in ("none", "rms", "rms up", "search", "search up"):
            for share in (0.25, 0.125):
                header = 1 if scale == "none" else 8
                bench.measure(
                    f"scale {scale}{', two tables' * tables}",
                    share=share,
                    scale=scale,
                    tables=tables,
                    header=header,
                )
    bench.measure("scale search, steps by Lloyd", rounds=4)


def group_search(bench: Bench) -> None:
    for scale in ("octaves", "fine", "rms search"):
        for share in (0.25, 0.125):
            bench.measure(f"scale {scale}", share=share, scale=scale)


def group_energy(bench: Bench) -> None:
    """Variances of components, for what needs no model."""
    energy = torch.stack([bench.prepared(part)[3] for part in bench.samples])
    torch.save(energy.cpu(), os.environ.get("OUT", ".") + "/energy.pt")


def group_sinks(bench: Bench) -> None:
    """Which tokens take the second class, and the divergence behind left padding."""
    rows = bench.rows()
    first, others = [], []
    for part, row in rows.items():
        samples = bench.samples[part]
        _, label = row.centred(samples.value @ row.transform.encode.mT)
        first.append(label[samples.position == 0].float().mean().item())
        others.append(label[samples.position > 0].float().mean().item())
    show = lambda x: " ".join(f"{100 * v:.0f}" for v in x)  # noqa: E731
    print(
        f"\nsecond class, % of first tokens, keys: {show(first[::2])}; values: {show(first[1::2])}"
    )
    print(f"of others, keys: {show(others[::2])}; values: {show(others[1::2])}\n")
    ids = torch.cat([part[:2, :512] for part in bench.texts.values()]).to(bench.device)
    for padding in (0, 100):
        padded = torch.nn.functional.pad(ids, (padding, 0))
        mask = torch.ones_like(padded)
        mask[:, :padding] = 0
        position = (mask.cumsum(-1) - 1).clamp_min(0)
        coders = {part: coder(row, bench.model) for part, row in rows.items()}
        states = []
        for active in ({}, coders):
            with replaced(bench.model, active, position), torch.no_grad():
                states.append(
                    bench.model(padded, attention_mask=mask, position_ids=position, use_cache=False)
                    .logits[:, padding:]
                    .log_softmax(-1)
                )
        p, q = states
        print(
            f"left padding {padding}: KL {(p.exp() * (p - q)).sum(-1).mean().item():.4f}",
            flush=True,
        )


def group_again(bench: Bench) -> None:
    """Moments and Fisher metric of the coded model instead of the source."""
    samples = bench.samples
    for share in (0.125, 0.0625):
        for _ in range(2):
            rows = bench.rows(share=share)
            coders = {part: coder(row, bench.model) for part, row in rows.items()}
            bench.samples = collect(bench.model, bench.blocks, bench.judge.batch, coders=coders)
            bench.prepared.cache_clear()
            bench.measure("moments of the coded model", share=share)
        bench.samples = samples
        bench.prepared.cache_clear()


def group_classes(bench: Bench) -> None:
    for count in (1, 4, 16):
        bench.measure(f"{count} classes", count=count)
    bench.measure("2 classes, k-means", kmeans=10)


def group_keys(bench: Bench) -> None:
    for share in (0.125, 0.25, 0.0625, 0.1875):
        for blocks in (4, 8, 32):
            bench.measure(f"keys in {blocks} blocks", share=share, blocks=blocks)
        bench.measure("rotated keys", share=share, kind="rotated")


def group_bytes(bench: Bench) -> None:
    """Levels and padding in closed form: the error left, relative to any level and no padding."""
    energies = [bench.prepared(part)[3].double().cpu() for part in bench.samples]
    together, parts = torch.cat(energies), len(energies)
    aligns = (1, 2, 4, 8, 16)
    print("\n| levels | % | unpadded | " + " | ".join(f"{n} bytes" for n in aligns) + " |")
    print("|---" * (3 + len(aligns)) + "|")
    for levels, share in itertools.product(LEVEL_SETS, SHARES):
        total = int(2 * share * bench.n * parts)
        budget = 8 * (total - parts)
        free = remaining_error(together, allocate_bits(together, budget, FREE))
        errors = [remaining_error(together, allocate_bits(together, budget, levels))]
        for align in aligns:
            rows = share_rows(energies, total, align, levels)
            errors.append(sum(map(remaining_error, energies, rows)))
        cells = " | ".join(f"{(error / free).item():.3f}" for error in errors)
        print(f"| {levels} | {100 * share} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("gguf")
    parser.add_argument("groups", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--valid", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=180, help="of healing, at most")
    parser.add_argument("--steps", type=int, default=1000, help="of healing, at most")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.folder, gguf_file=arguments.gguf, dtype=torch.float32
    )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    bench = Bench(
        model,
        arguments.data,
        arguments.calibration,
        arguments.valid,
        arguments.length,
        arguments.batch,
    )
    bench.seconds, bench.steps = arguments.seconds, arguments.steps
    print(f"prepared in {time.perf_counter() - start:.0f} s")
    print(
        "| | % | ratio | KL | top-1 % | expected KL | K : V bits | seconds |\n|---"
        + "|---" * 7
        + "|"
    )
    for name in arguments.groups:
        globals()[f"group_{name}"](bench)


if __name__ == "__main__":
    main()
