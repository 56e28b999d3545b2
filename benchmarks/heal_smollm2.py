"""Refining and then healing SmolLM2-135M-Instruct, rows before and after, on one GPU.

    python benchmarks/heal_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf --heal-tokens 100e6 \\
        --train healing-train.jsonl.xz --valid healing-valid.jsonl.xz --runs 128:latent 128 \\
        --settings seed=0 seed=1 --tasks tasks/*.jsonl.xz --quality

common/models.py says what a run is. --refine-steps 0 heals what the closed form gives,
--heal-tokens 0 heals nothing; each of --settings heals the same refined model. --tasks and
--quality (positions, needles, chat) compare all healed models with the source.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.arguments import given_settings, parser
from common.blocks import train_blocks
from common.models import Conversions, load, plan_of
from common.quality import quality_tables, task_table
from common.tables import Table, heal_row
from tpa_convert.refinement.regression import RefinementSettings, refine


def refined(
    table: Table, run: str, convert: Conversions, steps: int, folder: str | None
) -> tuple[PreTrainedModel, float]:
    """Converts and refines, or reads what an earlier run has left in the folder; with a row.

    Returns: the model and its floats.
    """
    source = table.source
    plan = plan_of(run, source.family.attention_sizes(source.model.config))
    kept = folder and Path(folder, f"{Path(run).name.replace(':', '-')}-{steps}")
    if kept and kept.exists():
        kept_model = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
        return kept_model.to(source.model.device), plan.kv_floats
    start = time.perf_counter()
    model, _ = convert(plan)
    if steps:
        refine(source.model, model, convert.blocks, RefinementSettings(steps=steps))
    kind = "refined" if steps else "closed form"
    table.row(f"{run} {kind}", model, plan.kv_floats, time.perf_counter() - start)
    if kept:
        model.save_pretrained(kept)
    return model, plan.kv_floats


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--runs", nargs="+", default=["128"])
    options.add_argument("--refine-steps", type=int, default=600)
    options.add_argument("--refine-blocks", type=int, default=256, help="1024 tokens each")
    options.add_argument("--refined", help="folder of refined models, to reuse with the same text")
    options.add_argument("--heal-tokens", type=float, default=10e6)
    options.add_argument("--length", type=int, default=1024, help="tokens of a block in healing")
    options.add_argument("--settings", nargs="+", default=[""], help="seed=1,learning_rate=1e-4")
    options.add_argument("--tasks", nargs="*", default=[], help="multiple-choice files")
    options.add_argument("--quality", action="store_true", help="positions, needles and chat")
    arguments = options.parse_args()
    source = load(arguments.source)
    table = Table.start(source, arguments.valid, arguments.valid_blocks)
    blocks = train_blocks(arguments.train, source, 1024, arguments.refine_blocks)
    convert = Conversions(source, blocks)
    training = train_blocks(arguments.train, source, arguments.length)
    models = {"source": source.model}
    for run in arguments.runs:
        torch.compiler.reset()  # the compiler's cache has room for a few shapes only
        start, floats = refined(table, run, convert, arguments.refine_steps, arguments.refined)
        for text in arguments.settings if arguments.heal_tokens else ():
            torch.compiler.reset()
            student = copy.deepcopy(start)
            name = f"{run} {text}".strip()
            heal_row(table, name, student, training, arguments, floats, **given_settings(text))
            models[f"{name} healed"] = student
    if arguments.tasks:
        task_table(models, source.tokenizer, arguments.tasks)
    if arguments.quality:
        quality_tables(models, source.tokenizer, arguments.valid)


if __name__ == "__main__":
    main()
