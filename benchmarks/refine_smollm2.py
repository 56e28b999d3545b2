"""Layer-wise refinement of converted SmolLM2-135M-Instruct on one GPU.

    python benchmarks/refine_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf \\
        --runs 256:absorbed 192:absorbed:measured 128:latent --settings steps=600 \\
        --train healing-train.jsonl.xz --valid healing-valid.jsonl.xz \\
        --tasks tasks/*.jsonl.xz --positions

common/models.py says what a run is. --tasks and --positions compare all refined models with the
source. `--train shipped` calibrates on the text of the package; --layers cuts the source off.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from common.arguments import given_settings, parser
from common.blocks import train_blocks
from common.models import load, plan_of
from common.quality import position_table, task_table
from common.tables import Table
from tpa_convert.calibration.moments import collect_moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.evaluation.texts import blocks_by_source
from tpa_convert.planning.sensitivity import LayerSensitivity, measure_sensitivity
from tpa_convert.refinement.regression import RefinementSettings, refine
from tpa_convert.sources import Source
from tpa_convert.text.read import load_documents


def shorten(source: Source, layers: int) -> None:
    """Cuts the source off after so many layers."""
    source.model.model.layers = nn.ModuleList(source.model.model.layers[:layers])
    source.model.config.num_hidden_layers = layers


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--runs", nargs="+", default=["256", "192", "128"])
    options.add_argument("--settings", nargs="+", default=[""])
    options.add_argument("--refine-blocks", type=int, default=256, help="1024 tokens each")
    options.add_argument("--tasks", nargs="*", default=[], help="multiple-choice files")
    options.add_argument("--positions", action="store_true", help="to 8192 tokens")
    options.add_argument("--layers", type=int)
    arguments = options.parse_args()
    source = load(arguments.source)
    if arguments.layers:
        shorten(source, arguments.layers)
    config = source.family.attention_sizes(source.model.config)
    table = Table.start(source, arguments.valid, arguments.valid_blocks)
    blocks = train_blocks(arguments.train, source, 1024, arguments.refine_blocks)
    start = time.perf_counter()
    moments = collect_moments(source, blocks)
    print(f"<!-- calibration on {blocks.numel():,} tokens {time.perf_counter() - start:.1f} s -->")
    sensitivity: list[LayerSensitivity] = []
    if any("measured" in run or "halfway" in run for run in arguments.runs):
        start = time.perf_counter()
        # of the blocks that refinement does not train on
        sensitivity = measure_sensitivity(source, moments, blocks[:8])
        print(f"<!-- sensitivity {time.perf_counter() - start:.1f} s -->", flush=True)
    models = {"source": source.model}
    for run in arguments.runs:
        plan = plan_of(run, config, sensitivity)
        start = time.perf_counter()
        model = convert_model(source, plan, moments)
        table.row(f"{run} closed form", model, plan.kv_floats, time.perf_counter() - start)
        for text in arguments.settings:
            model = convert_model(source, plan, moments).to(source.model.device)
            torch._dynamo.reset()  # its cache has room for a few shapes only
            start = time.perf_counter()
            settings = RefinementSettings(**given_settings(text))
            report = refine(source.model, model, blocks, settings)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            name = f"{run} refined {text}".strip()
            table.row(name, model, plan.kv_floats, time.perf_counter() - start)
            errors = ", ".join(f"{r.before:.3f}→{r.after:.3f}" for r in report)
            print(f"<!-- {errors} -->", flush=True)
        models[f"{run} refined"] = model
    if arguments.positions:
        texts = blocks_by_source(source.tokenizer, load_documents(arguments.valid), 8192, 8)
        position_table(models, texts)
    if arguments.tasks:
        task_table(models, source.tokenizer, arguments.tasks)


if __name__ == "__main__":
    main()
