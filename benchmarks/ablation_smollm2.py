"""Every option and baseline at the same bytes on the same text, one change a row.

    python benchmarks/ablation_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf --floats 256 192 128 \\
        --train healing-train.jsonl.xz --valid healing-valid.jsonl.xz

Ratios are perplexities relative to the source, geometric mean over the held-out sources. A verdict
compares with the first row: `keep` where the ratio falls at every budget, `drop` where it rises at
every one, else `mixed`. `--refine-at 128` repeats some rows with a short refinement on top.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common import baselines, variants
from common.arguments import parser
from common.blocks import train_blocks
from common.layer_statistics import collect, layer_weights
from common.models import load
from common.tables import Table
from tpa_convert.calibration.moments import Moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.decomposition import AttentionWeights
from tpa_convert.planning.search import plan_between, plan_measured, predicted_loss
from tpa_convert.planning.sensitivity import LayerSensitivity, measure_sensitivity
from tpa_convert.plans import Budget, Plan, plan_uniform, plan_widths
from tpa_convert.refinement.least_squares import refit
from tpa_convert.refinement.regression import RefinementSettings, refine
from tpa_convert.sources import Source


@dataclass
class Bench:
    """What every row works on."""

    source: Source
    config: dict[str, Any]
    moments: Moments
    blocks: Tensor
    sensitivity: list[LayerSensitivity]
    weights: list[AttentionWeights]

    def changed(self, change: baselines.Change, width_k: int, width_v: int) -> PreTrainedModel:
        """The source with the weights that `change` makes of every layer."""
        layers = self.moments.layers
        return baselines.changed(self.source.model, change, self.weights, layers, width_k, width_v)

    def uniform(self, floats: int, **settings: Any) -> Plan:
        return plan_uniform(self.config, Budget(kv_floats=floats), **settings)

    def split(self, floats: int, share_k: float, **settings: Any) -> Plan:
        width_k = max(8, round(share_k * floats / 8) * 8)
        layers = self.config["num_hidden_layers"]
        return plan_widths([(width_k, floats - width_k)] * layers, self.config, **settings)

    def converted(self, plan: Plan, **settings: Any) -> PreTrainedModel:
        return convert_model(self.source, plan, self.moments, **settings)

    def refitted(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same model with its output projections refitted."""
        model = model.to(self.source.model.device)
        refit(self.source.model, model, self.blocks)
        return model


Make = Callable[[Bench, int], PreTrainedModel]


def change(function: baselines.Change) -> Make:
    """A change of the weights at equal widths of K and V."""
    return lambda bench, floats: bench.changed(function, floats // 2, floats // 2)


def whole_heads(function: baselines.Change) -> Make:
    """The same where heads cannot be cut; an odd one goes to the keys."""

    def make(bench: Bench, floats: int) -> PreTrainedModel:
        head_dim = bench.config["head_dim"]
        width_v = floats // 2 // head_dim * head_dim
        return bench.changed(function, floats - width_v, width_v)

    return make


CLOSED_FORM = "gauge decomposition"
BASELINES: dict[str, Make] = {
    "mean-pooled heads (GQA/MQA)": whole_heads(baselines.mean_pooled),
    "aligned pooled heads (Procrustes, phases)": whole_heads(baselines.aligned_pooled),
    "joint SVD of weights, K rebuilt": change(baselines.joint_svd),
    "whitened joint SVD, K rebuilt (Palu, CARE)": change(baselines.whitened_joint_svd),
    "whitened joint SVD, K rebuilt, K : V = 3 : 5": lambda b, n: b.changed(
        baselines.whitened_joint_svd, 3 * n // 8, 5 * n // 8
    ),
    "Tucker, whitened": lambda b, n: b.converted(b.uniform(n), method="tucker"),
    "CP, whitened": lambda b, n: b.converted(b.uniform(n), method="cp"),
}
OPTIONS: dict[str, Make] = {
    "− attention weighting": change(variants.tokens_alike),
    "− centring of K under attention": change(variants.uncentred_keys),
    "+ constant of V to an output bias": change(variants.value_constant),
    "+ each head's own attention for K (ALS)": change(variants.attention_per_head),
    "+ W_Q refitted to each head's own attention": lambda b, n: variants.queries_refitted(
        b.source, b.uniform(n, gauge="absorbed"), b.moments
    ),
    "+ K : V = 5 : 3": lambda b, n: b.converted(b.split(n, 5 / 8)),
    "+ K : V = 3 : 5": lambda b, n: b.converted(b.split(n, 3 / 8)),
    "+ widths by sensitivity": lambda b, n: b.converted(plan_measured(b.sensitivity, b.config, n)),
    "+ slow pairs folded, exact to 8192 tokens": lambda b, n: variants.folded_model(
        b.source, b.uniform(n, gauge="absorbed"), b.moments, 8192
    ),
    "+ slow pairs folded, exact to 1024 tokens": lambda b, n: variants.folded_model(
        b.source, b.uniform(n, gauge="absorbed"), b.moments, 1024
    ),
    "+ latent keys": lambda b, n: b.converted(b.uniform(n, key_cache="latent")),
    "+ latent keys, K : V = 1 : 1": lambda b, n: b.converted(b.split(n, 1 / 2, key_cache="latent")),
    "+ latent keys, K : V = 1 : 3": lambda b, n: b.converted(b.split(n, 1 / 4, key_cache="latent")),
    "+ latent keys, and W_O refitted": lambda b, n: b.refitted(
        b.converted(b.uniform(n, key_cache="latent"))
    ),
    "+ features shared by K and V": change(variants.shared_features),
    "+ moments behind converted layers": lambda b, n: variants.sequential_model(
        b.source, b.uniform(n), b.moments, b.blocks
    ),
    "+ W_O refitted to the source's stream": lambda b, n: b.refitted(b.converted(b.uniform(n))),
    "+ both": lambda b, n: b.refitted(
        variants.sequential_model(b.source, b.uniform(n), b.moments, b.blocks)
    ),
    "+ affine head factors": lambda b, n: b.converted(b.uniform(n, form="affine")),
}
# Refined with few steps, all with the gauge absorbed; each row is one change of the first.
REFINED: dict[str, tuple[Make, dict[str, Any]]] = {
    "refined": (lambda b, n: b.converted(b.uniform(n, gauge="absorbed")), {}),
    "refined: gauge applied": (lambda b, n: b.converted(b.uniform(n, gauge="applied")), {}),
    "refined: latent keys": (
        lambda b, n: b.converted(b.uniform(n, gauge="absorbed", key_cache="latent")),
        {},
    ),
    "refined: latent keys, gauge of the values applied": (
        lambda b, n: b.converted(b.uniform(n, gauge="applied", key_cache="latent")),
        {},
    ),
    "refined: latent keys, K : V = 1 : 1": (
        lambda b, n: b.converted(b.split(n, 1 / 2, gauge="absorbed", key_cache="latent")),
        {},
    ),
    "refined: latent keys, K : V = 1 : 3": (
        lambda b, n: b.converted(b.split(n, 1 / 4, gauge="absorbed", key_cache="latent")),
        {},
    ),
    "refined: learning rate 1e-3": (
        lambda b, n: b.converted(b.uniform(n, gauge="absorbed")),
        {"learning_rate": 1e-3},
    ),
    "refined: K : V = 9 : 7": (
        lambda b, n: b.converted(b.split(n, 9 / 16).with_gauge("absorbed")),
        {},
    ),
    "refined: K : V = 7 : 9": (
        lambda b, n: b.converted(b.split(n, 7 / 16).with_gauge("absorbed")),
        {},
    ),
    "refined: halfway to widths by sensitivity": (
        lambda b, n: b.converted(
            plan_between(
                b.uniform(n), plan_measured(b.sensitivity, b.config, n, 16), b.config
            ).with_gauge("absorbed")
        ),
        {},
    ),
    "refined: folded to 8192 tokens": (OPTIONS["+ slow pairs folded, exact to 8192 tokens"], {}),
    "refined: W_O refitted before": (
        lambda b, n: b.refitted(b.converted(b.uniform(n, gauge="absorbed"))),
        {},
    ),
    "refined: widths by sensitivity": (
        lambda b, n: b.converted(
            plan_measured(b.sensitivity, b.config, n, 16).with_gauge("absorbed")
        ),
        {},
    ),
}


def verdict(ratios: list[float], reference: list[float]) -> str:
    """What the ratios say about a change, at all budgets together."""
    signs = {a < b for a, b in zip(ratios, reference, strict=True)}
    return {frozenset({True}): "keep", frozenset({False}): "drop"}.get(frozenset(signs), "mixed")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--floats", nargs="*", type=int, default=[256, 192, 128])
    options.add_argument("--block-length", type=int, default=1024)
    options.add_argument("--sensitivity-blocks", type=int, default=8)
    options.add_argument("--only", nargs="*", default=["baselines", "options"])
    options.add_argument("--rows", default="", help="only rows that match this pattern")
    options.add_argument("--refine-at", nargs="*", type=int, default=[])
    options.add_argument("--refine-steps", type=int, default=200)
    options.add_argument("--refine-blocks", type=int, default=256)
    arguments = options.parse_args()
    source = load(arguments.source)
    table = Table.start(source, arguments.valid, arguments.valid_blocks)
    count = arguments.calibration_blocks + arguments.sensitivity_blocks
    text = train_blocks(
        arguments.train, source, arguments.block_length, max(count, arguments.refine_blocks)
    )
    held_out, blocks = text[: arguments.sensitivity_blocks], text[arguments.sensitivity_blocks :]
    blocks = blocks[: arguments.calibration_blocks]
    start = time.perf_counter()
    moments = collect(source, blocks)
    print(f"<!-- statistics {time.perf_counter() - start:.1f} s -->", flush=True)
    start = time.perf_counter()
    sensitivity = measure_sensitivity(source, moments, held_out)
    print(f"<!-- sensitivity {time.perf_counter() - start:.1f} s -->", flush=True)
    config = source.family.attention_sizes(source.model.config)
    bench = Bench(source, config, moments, blocks, sensitivity, layer_weights(source))
    print_plans(bench, arguments.floats)

    rows: dict[str, Make] = {CLOSED_FORM: lambda b, n: b.converted(b.uniform(n))}
    rows |= BASELINES if "baselines" in arguments.only else {}
    rows |= OPTIONS if "options" in arguments.only else {}
    wanted = re.compile(arguments.rows)
    rows = {k: v for k, v in rows.items() if k == CLOSED_FORM or wanted.search(k)}
    if arguments.floats:
        closed = {name: (make, None) for name, make in rows.items()}
        show(run(table, bench, closed, arguments.floats), CLOSED_FORM, arguments.floats)
    if arguments.refine_at:
        text_all = train_blocks(
            arguments.train, source, arguments.block_length, arguments.refine_blocks
        )
        refined = {
            name: (make, RefinementSettings(**{"steps": arguments.refine_steps, **settings}))
            for name, (make, settings) in REFINED.items()
            if name == "refined" or wanted.search(name)
        }
        bench.blocks = text_all
        summary = run(table, bench, refined, arguments.refine_at)
        show(summary, "refined", arguments.refine_at)


def run(
    table: Table,
    bench: Bench,
    rows: dict[str, tuple[Make, RefinementSettings | None]],
    budgets: list[int],
) -> dict[str, list[tuple[float, float]]]:
    """(ratio, seconds) of each row at each budget."""
    summary: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for floats in budgets:
        for name, (make, settings) in rows.items():
            start = time.perf_counter()
            model = make(bench, floats)
            if settings is not None:
                model = model.to(bench.source.model.device)
                torch._dynamo.reset()
                refine(bench.source.model, model, bench.blocks, settings)
            seconds = time.perf_counter() - start
            summary[name].append((table.row(name, model, floats, seconds), seconds))
    return summary


def show(summary: dict[str, list[tuple[float, float]]], reference: str, budgets: list[int]) -> None:
    """The table that is quoted: ratios, what a row gains on the reference, and the verdict."""
    print(f"\n| | {' | '.join(map(str, budgets))} | gain % | seconds | verdict |")
    print("|---" * (len(budgets) + 4) + "|")
    base = [ratio for ratio, _ in summary[reference]]
    for name, cells in summary.items():
        ratios = [ratio for ratio, _ in cells]
        gains = " / ".join(f"{100 * (1 - r / b):+.1f}" for r, b in zip(ratios, base, strict=True))
        seconds = max(seconds for _, seconds in cells)
        text = "" if name == reference else verdict(ratios, base)
        cells_text = " | ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {name} | {cells_text} | {gains} | {seconds:.0f} | {text} |", flush=True)
    print(flush=True)


def print_plans(bench: Bench, budgets: list[int]) -> None:
    """Predicted losses of uniform and measured plans, and the measured widths."""
    for floats in budgets:
        plan = plan_measured(bench.sensitivity, bench.config, floats)
        predicted = [predicted_loss(p, bench.sensitivity) for p in (bench.uniform(floats), plan)]
        widths = " ".join(f"{layer.width_k}+{layer.width_v}" for layer in plan.layers)
        print(f"<!-- {floats}: predicted KL {predicted[0]:.3f} → {predicted[1]:.3f}; {widths} -->")


if __name__ == "__main__":
    main()
