"""Healing of a converted model from the disk, beside its source: speed and memory of a few steps.

    PYTHONPATH=. python benchmarks/heal_converted.py converted --steps 6 \\
        --settings 'gradient_checkpointing=true,trainable="lora"'

Prints, as Markdown, tokens per second, share of the GPU's peak arithmetic (MFU), the peak of the
GPU's memory as measured and as `heal --dry-run` predicts it, and losses. The text is random tokens,
32 sequences of 1024 a step, or --blocks of them; batch sizes are those that `heal` chooses, or are
among the settings. Nothing is saved.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.arguments import given_settings
from common.healing import mfu_of
from common.machine import device_name, versions
from tpa_convert.export.save import load_model, read_provenance
from tpa_convert.healing import HealingSettings, heal
from tpa_convert.healing.training.needs import healing_needs
from tpa_convert.sources import load_source

BLOCKS, LENGTH = 32, 1024


def models_of(directory: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The converted model in fp32, and its source in bf16."""
    source = read_provenance(directory)["source"]["id"]
    teacher = load_source(source, dtype=torch.bfloat16).model
    return load_model(directory, dtype=torch.float32), teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("converted", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of 1024 tokens, a step")
    parser.add_argument("--settings", nargs="+", default=[""], help="of healing: seed=1,skew=0")
    options = parser.parse_args()
    print(f"{device_name()}, {options.converted.name}, {versions()}", flush=True)
    start = time.perf_counter()
    student, teacher = models_of(options.converted)
    print(
        f"{student.num_parameters():,} and {teacher.num_parameters():,} parameters, loaded in "
        f"{time.perf_counter() - start:.0f} s\n\n"
        "| settings | batch | tokens/s | MFU | peak GB | predicted | seconds in all | losses |\n"
        f"{'|---' * 8}|",
        flush=True,
    )
    size = (options.blocks * options.steps, LENGTH)
    vocabulary = student.config.get_text_config().vocab_size
    blocks = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0))
    for text in options.settings:
        settings = HealingSettings(
            tokens=blocks.numel(),
            tokens_per_step=options.blocks * LENGTH,
            save_steps=10**9,
            **given_settings(text),
        )
        needs = healing_needs(student, teacher, settings)
        torch.compiler.reset()
        with tempfile.TemporaryDirectory() as folder:
            report = heal(
                student,
                teacher,
                None,
                blocks,
                settings=settings,
                output_dir=folder,
                progress=False,
            )
        predicted = needs.gpu + (report.batch_size - 1) * needs.sequence
        losses = ", ".join(f"{step}: {loss:.5f}" for step, loss in report.losses)
        print(
            f"| {text} | {report.batch_size} | {report.tokens_per_second or 0:,.0f} "
            f"| {mfu_of(student, teacher, report, LENGTH):.1%} "
            f"| {(report.peak_memory_bytes or 0) / 1e9:.1f} | {predicted / 1e9:.1f} "
            f"| {report.seconds:.0f} | {losses} |",
            flush=True,
        )
        student, teacher = student.cpu(), teacher.cpu()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
