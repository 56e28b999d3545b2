"""Layer-wise refinement of converted SmolLM2-135M-Instruct on one GPU: settings beside each other.

    python benchmarks/refine_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf \\
        --runs 256 192 192:absorbed 128 --settings steps=200 steps=600 --heal 128 \\
        --train healing-train.jsonl.xz --valid healing-valid.jsonl.xz

A run is a number of floats, with a gauge other than the automatic one after a colon. Of
the runs in --heal, the model of the last settings is healed on --heal-tokens as well.
"""

from __future__ import annotations

import time

import torch
from smollm2 import Table, heal_row, load, parser, train_blocks

from tpa_convert.calibration.moments import collect_moments
from tpa_convert.conversion import convert_model
from tpa_convert.planning import Budget, plan_uniform
from tpa_convert.refinement import RefinementSettings, refine


def settings_of(text: str) -> RefinementSettings:
    """`steps=300,seed=1` to settings."""
    pairs = (pair.split("=") for pair in text.split(",") if pair)
    return RefinementSettings(
        **{name: type(getattr(RefinementSettings, name))(value) for name, value in pairs}
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--runs", nargs="+", default=["256", "192", "128"])
    arguments.add_argument("--heal", nargs="*", default=[], metavar="RUN")
    arguments.add_argument("--heal-tokens", type=float, default=10e6)
    arguments.add_argument("--settings", nargs="+", default=[""])
    arguments.add_argument("--refine-blocks", type=int, default=256, help="1024 tokens each")
    arguments = arguments.parse_args()
    source = load(arguments.source)
    config = source.architecture.llama_config(source.model.config)
    table = Table.start(source, arguments.valid, arguments.valid_blocks)
    blocks = train_blocks(arguments.train, source, 1024, arguments.refine_blocks)
    start = time.perf_counter()
    moments = collect_moments(source, blocks)
    print(f"<!-- calibration {time.perf_counter() - start:.1f} s -->", flush=True)
    for run in arguments.runs:
        floats, _, gauge = run.partition(":")
        plan = plan_uniform(config, Budget(kv_floats=int(floats)), gauge=gauge or "auto")
        table.row("closed form", convert_model(source, plan, moments), plan.kv_floats, 0.0)
        for text in arguments.settings:
            model = convert_model(source, plan, moments).to(source.model.device)
            start = time.perf_counter()
            report = refine(source.model, model, blocks, settings_of(text))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            name = f"refined {gauge} {text}"
            table.row(name, model, plan.kv_floats, time.perf_counter() - start)
            errors = ", ".join(f"{r.before:.3f}→{r.after:.3f}" for r in report)
            print(f"<!-- {errors} -->", flush=True)
        if run in arguments.heal:
            training = train_blocks(arguments.train, source, 1024)
            heal_row(table, f"{floats} refined, then", model, training, arguments, plan.kv_floats)


if __name__ == "__main__":
    main()
