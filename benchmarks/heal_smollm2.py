"""Healing SmolLM2-135M-Instruct after conversion, one row before and one after, on one GPU.

    python benchmarks/heal_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf --heal-tokens 10e6 \\
        --train healing-train.jsonl.xz --valid healing-valid.jsonl.xz --runs 128 72+80 affine-128
"""

from __future__ import annotations

from typing import Any, cast

from smollm2 import Table, heal_row, load, parser, train_blocks

from tpa_convert.calibration.moments import collect_moments
from tpa_convert.conversion import convert_model
from tpa_convert.modeling import Form
from tpa_convert.planning import Budget, Plan, plan_uniform


def plan_of(run: str, config: dict[str, Any]) -> Plan:
    """`N`: static with N floats. `K+V`: static with these widths. `affine-N`: N features and four
    contextual components each."""
    if "+" in run:
        width_k, width_v = map(int, run.split("+"))
        return plan_uniform(config, Budget(width_k=width_k, width_v=width_v))
    form, _, floats = run.rpartition("-")
    if not form:
        return plan_uniform(config, Budget(kv_floats=int(floats)))
    width = int(floats) // 2
    budget = Budget(rank_k=4, rank_v=4, width_k=width, width_v=width)
    return plan_uniform(config, budget, form=cast(Form, form))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--heal-tokens", type=float, default=10e6)
    options.add_argument("--runs", nargs="+", default=["128", "72+80", "affine-128"])
    arguments = options.parse_args()
    source = load(arguments.source)
    config = source.architecture.llama_config(source.model.config)
    table = Table.start(source, arguments.valid, arguments.valid_blocks)
    calibration = train_blocks(arguments.train, source, 512, arguments.calibration_blocks)
    moments = collect_moments(source, calibration)
    training = train_blocks(arguments.train, source, 1024)
    for run in arguments.runs:
        plan = plan_of(run, config)
        student = convert_model(source, plan, moments)
        table.row(f"{run} one-shot", student, plan.kv_floats, 0.0)
        heal_row(table, run, student, training, arguments, plan.kv_floats)


if __name__ == "__main__":
    main()
