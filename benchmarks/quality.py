"""Tables beyond perplexity: by position in a long text, zero-shot tasks, last words of sentences,
needles, chat.

    python benchmarks/quality.py SmolLM2-135M-Instruct.Q4_1.gguf small healed \\
        --valid healing-valid.jsonl.xz --tasks tasks/*.jsonl.xz

Held-out text gives the positions, and hides the needles. The models have to share the source's
tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from common.machine import device_name, versions
from common.models import load
from common.quality import quality_tables, task_table
from tpa_convert.export.save import load_converted


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("source", help="the source model")
    options.add_argument("models", nargs="+", help="directories of converted models")
    options.add_argument("--valid", required=True, help="jsonl text with a `source` column")
    options.add_argument("--tasks", nargs="*", default=[], help="multiple-choice files")
    options.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    options.add_argument("--answer-tokens", type=int, default=128)
    arguments = options.parse_args()
    source = load(arguments.source)
    models = {"source": source.model}
    for directory in arguments.models:
        model, _ = load_converted(directory, dtype=torch.float32)
        models[Path(directory).name] = model.to(source.model.device)
    print(f"{device_name()}, {versions()}")
    if arguments.tasks:
        task_table(models, source.tokenizer, arguments.tasks)
    quality_tables(
        models, source.tokenizer, arguments.valid, arguments.lengths, arguments.answer_tokens
    )


if __name__ == "__main__":
    main()
