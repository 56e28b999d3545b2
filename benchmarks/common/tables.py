"""Rows of a Markdown table: what models make of held-out text, beside their source."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common import results
from common.blocks import valid_blocks
from common.machine import device_name, versions
from common.models import source_heads
from common.paired import HeldOut, Scores, ratio, scores
from tpa_convert.evaluation.metrics.cache import cache_bytes
from tpa_convert.forward.divergence import Divergence
from tpa_convert.healing import HealingSettings, heal
from tpa_convert.sources import Source


@dataclass
class Table:
    """Perplexity on each held-out source beside the source model's, printed as it grows.

    Attributes:
        contexts: tokens at which the bytes of the live cache are measured, a column each.
        scores: of every row, by its name; the source's come first.
        rows: what `save` writes.
    """

    source: Source
    blocks: Mapping[str, Tensor]
    contexts: Sequence[int] = ()
    scores: dict[str, Scores] = field(default_factory=dict)
    rows: list[list[results.Cell]] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        source: Source,
        valid: str,
        max_blocks: int,
        length: int = 1024,
        contexts: Sequence[int] = (),
    ) -> Table:
        """Evaluates the source and prints the head of the table."""
        print(f"{device_name()}, {versions()}\n")
        table = cls(source, valid_blocks(valid, source, length, max_blocks), contexts)
        names = [f"{name} ({len(part)})" for name, part in table.blocks.items()]
        caches = [f"cache at {context}, kB" for context in contexts]
        columns = ["", "floats", *names, "ratio", "KL", "top-1 %", *caches, "seconds"]
        print(f"| {' | '.join(columns)} |", flush=True)
        print("|---" * len(columns) + "|")
        table.row("source", source.model, 2 * source_heads(source), 0.0)
        return table

    def row(self, name: str, model, floats: float, seconds: float) -> float:
        """Evaluates a model, prints its row and returns its ratio to the source."""
        model = model.to(self.source.model.device)
        texts = {key: HeldOut(part) for key, part in self.blocks.items()}
        found = self.scores[name] = scores(model, self.source.model, texts)
        perplexities = {key: part.perplexity.perplexity for key, part in found.items()}
        agreements = [part.agreement for part in found.values()]
        tokens = sum(agreement.tokens for agreement in agreements)
        kl = sum(agreement.kl * agreement.tokens for agreement in agreements) / tokens
        top1 = sum(agreement.top1 * agreement.tokens for agreement in agreements) / tokens
        beside = ratio(found, next(iter(self.scores.values())))
        share = 100 * floats / (2 * source_heads(self.source))
        cells = (share, *perplexities.values(), beside, kl, 100 * top1)
        self.rows.append([name, *(float(f"{value:.5g}") for value in cells), round(seconds, 1)])
        values = " | ".join(f"{value:.2f}" for value in perplexities.values())
        caches = "".join(f" {self.cache_kilobytes(model, c):.1f} |" for c in self.contexts)
        print(
            f"| {name} | {floats:.0f} | {values} | {beside:.3f} | {kl:.3f} "
            f"| {100 * top1:.1f} |{caches} {seconds:.1f} |",
            flush=True,
        )
        return beside

    def save(self, title: str, path: Path | None) -> None:
        """Writes the rows so far to a file of results, if one is wanted."""
        columns = ["", "bytes, %", *self.blocks, "ratio", "KL", "top-1, %", "seconds"]
        if path is not None:
            results.save(results.of_this_run(title, columns, self.rows), path)

    @staticmethod
    def cache_kilobytes(model: PreTrainedModel, tokens: int) -> float:
        """Of the live cache after so many tokens, at two bytes a number. Windows cap it."""
        measured = cache_bytes(model, tokens)
        return measured.at(2) * tokens / 1000


def heal_row(
    table: Table,
    name: str,
    student,
    training: Tensor,
    arguments,
    floats: float,
    *,
    divergence: Divergence | None = None,
    **changes: Any,
) -> None:
    """Heals `student` on `arguments.heal_tokens`, with changed settings, and prints its row and its
    curve on one block of each held-out source."""
    teacher = copy.deepcopy(table.source.model).to(torch.bfloat16)
    tokens = int(arguments.heal_tokens)
    settings = HealingSettings(
        **{"tokens": tokens, "save_steps": 10**9, "valid_steps": 300, **changes}
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = heal(
            student,
            teacher,
            None,
            training,
            settings=settings,
            valid_blocks=torch.cat([part[:2] for part in table.blocks.values()]),  # type: ignore[arg-type]
            output_dir=folder,
            divergence=divergence,
            progress=False,
        )
    seconds = time.perf_counter() - start
    table.row(f"{name} healed on {arguments.heal_tokens / 1e6:g} M", student, floats, seconds)
    curve = ", ".join(
        f"{step * settings.tokens_per_step / 1e6:.0f} M {kl:.4f}"
        for step, kl in report.valid_losses
    )
    memory = f"{report.peak_memory_bytes / 1e9:.1f} GB; " if report.peak_memory_bytes else ""
    speed = f"{report.tokens_per_second or 0:,.0f} tokens/s"
    print(f"<!-- {speed}; {memory}held-out KL after {curve} -->", flush=True)
