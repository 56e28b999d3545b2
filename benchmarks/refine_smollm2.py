"""Layer-wise refinement of converted SmolLM2-135M-Instruct on one GPU: settings beside each other.

    python benchmarks/refine_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf --floats 256 192 128 \\
        --train healing-train.jsonl.xz --valid healing-valid.jsonl.xz \\
        --settings steps=300 steps=300,drift=0
"""

from __future__ import annotations

import time

import torch
from smollm2 import Table, load, parser, train_blocks

from tpa_convert.calibration.moments import collect_moments
from tpa_convert.conversion import convert_model
from tpa_convert.planning import Budget, plan_uniform
from tpa_convert.refinement import RefinementSettings, refine


def settings_of(text: str) -> RefinementSettings:
    """`steps=300,drift=0` to settings."""
    pairs = (pair.split("=") for pair in text.split(",") if pair)
    return RefinementSettings(
        **{name: type(getattr(RefinementSettings, name))(value) for name, value in pairs}
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--floats", type=int, nargs="+", default=[256, 192, 128])
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
    for floats in arguments.floats:
        plan = plan_uniform(config, Budget(kv_floats=floats))
        table.row("closed form", convert_model(source, plan, moments), floats, 0.0)
        for text in arguments.settings:
            model = convert_model(source, plan, moments).to(source.model.device)
            start = time.perf_counter()
            report = refine(source.model, model, blocks, settings_of(text))
            torch.cuda.synchronize()
            table.row(f"refined {text}", model, floats, time.perf_counter() - start)
            errors = ", ".join(f"{r.before:.3f}→{r.after:.3f}" for r in report)
            print(f"<!-- {errors} -->", flush=True)


if __name__ == "__main__":
    main()
