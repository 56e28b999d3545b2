"""SmolLM2-135M-Instruct with a coded cache: converted, refit, healed; rows of a table.

    python benchmarks/coded_cache.py SmolLM2-135M-Instruct.Q4_1.gguf --train tokens.npy \\
        --valid valid.npz --runs 25 12.5 12.5:alone 12.5:4 --refit \\
        --heal-tokens 24e6 --settings seed=0 --tasks tasks/*.jsonl.xz

common/models.py says what a run of a coded cache is. The column `floats` counts bytes in numbers of
16 bits, headers and padding included. common/arguments.py says the rest.
On a CPU, `--valid-blocks 1 --calibration-blocks 16` takes some minutes.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch

from common.arguments import given_settings, parser
from common.blocks import train_blocks
from common.models import coded_model, load
from common.quality import quality_tables, task_table
from common.tables import Table, heal_row
from tpa_convert.calibration.cache_moments import collect_cache_moments
from tpa_convert.refinement.least_squares import refit


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--runs", nargs="+", default=["12.5"])
    options.add_argument("--refit", action="store_true", help="rows before and after a refit")
    options.add_argument("--refit-blocks", type=int, default=64, help="1024 tokens each")
    options.add_argument("--heal-tokens", type=float, default=0)
    options.add_argument("--length", type=int, default=1024, help="tokens of a block in healing")
    options.add_argument("--settings", nargs="+", default=[""], help="seed=1,learning_rate=1e-4")
    options.add_argument("--tasks", nargs="*", default=[], help="multiple-choice files")
    options.add_argument("--quality", action="store_true", help="positions, needles and chat")
    options.add_argument("--keep", type=Path, help="folder for the healed models")
    arguments = options.parse_args()
    source = load(arguments.source)
    table = Table.start(source, arguments.valid, arguments.valid_blocks)
    blocks = train_blocks(arguments.train, source, 512, arguments.calibration_blocks)
    start = time.perf_counter()
    moments = collect_cache_moments(source, blocks)
    print(f"<!-- calibration on {blocks.numel():,} tokens {time.perf_counter() - start:.1f} s -->")
    training = train_blocks(arguments.train, source, arguments.length)
    refit_blocks = train_blocks(arguments.train, source, 1024, arguments.refit_blocks)
    models = {"source": source.model}
    for run in arguments.runs:
        start = time.perf_counter()
        model, floats = coded_model(source, moments, run)
        table.row(run, model, floats, time.perf_counter() - start)
        if arguments.refit:
            start = time.perf_counter()
            refit(source.model, model, refit_blocks)
            table.row(f"{run} refit", model, floats, time.perf_counter() - start)
        for text in arguments.settings if arguments.heal_tokens else ():
            torch.compiler.reset()
            student = copy.deepcopy(model)
            name = f"{run} {text}".strip()
            heal_row(table, name, student, training, arguments, floats, **given_settings(text))
            models[f"{name} healed"] = student
            if arguments.keep:
                folder = arguments.keep / name.replace(":", "-").replace(" ", "-")
                student.save_pretrained(folder)
                source.tokenizer.save_pretrained(folder)
    table.save(f"{Path(arguments.source).stem}: coded caches", arguments.json)
    if arguments.tasks:
        task_table(models, source.tokenizer, arguments.tasks)
    if arguments.quality:
        quality_tables(models, source.tokenizer, arguments.valid)


if __name__ == "__main__":
    main()
