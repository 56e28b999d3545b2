"""This package beside what else shrinks a cache, at equal bytes and on the same text.

    python benchmarks/comparison.py SmolLM2-135M-Instruct.Q4_1.gguf --train tokens.npy \\
        --valid valid.npz --other other.npz --tasks tasks/*.jsonl.xz --healed 12.5=healed \\
        --json benchmarks/results/comparison_smollm2.json

Every method is measured at the shares that it can take, on held-out text of the kinds that it was
calibrated on (`--valid`) and of other kinds: `--other`, sources of `--valid` by `--other-sources`,
and the questions of `--tasks` with their right choices. What loses is in the table too, and so is
what cannot run on this model, with the reason. Bytes are shares of 16 bits a number and count
scales, norms and headers. `--healed SHARE=DIR` adds a model of a directory.
common/arguments.py says the rest.

A second table, also written beside the first as `…_paired.json`, says how much more each other
method loses than this package at the same bytes or fewer, block by block of the same text, with
95 % intervals: ours is first, tied, or behind. Without training ours is the better of with and
without a refit, by the KL on `--valid`; healed models are compared by themselves.

`--speed 1 16` adds how fast each decodes at these batches, relative to the source in the same run,
after `--speed-context` tokens. Caches of KIVI's kind are then transformers' own quantised cache.
What only computes the logits that a smaller cache would give is `simulated` there.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
from transformers import PreTrainedModel

from common import results
from common.arguments import parser
from common.blocks import train_blocks, valid_blocks
from common.decoding import relative_speed
from common.machine import device_name, tf32, versions
from common.methods import HEALED, OURS, Comparison, itself
from common.models import load
from common.paired import HeldOut, Scores, difference, ratio, scores
from common.quality import long_texts, needle_questions, question_text
from tpa_convert.errors import UserError
from tpa_convert.evaluation import (
    Accuracy,
    Question,
    load_questions,
    multiple_choice,
    paired_drop,
)
from tpa_convert.evaluation.metrics.multiple_choice import task_name
from tpa_convert.sources import Source

TRAINING_KINDS, OTHER_KINDS = "training kinds", "other kinds"
SAME_BYTES = 1.01  # shares that differ by less are the same


@dataclass
class Row:
    """A method, measured.

    Attributes:
        share: of the source's bytes, percent.
        scores: by kind of text and text.
        tasks, needles: by task and by length.
        speed: relative to the source, for each batch; in words where it cannot be measured.
        seconds: to make it, and to measure it.
    """

    method: str
    share: float
    scores: Mapping[str, Scores]
    tasks: Mapping[str, Accuracy]
    needles: Mapping[int, Accuracy]
    speed: Sequence[float | str]
    seconds: tuple[float, float]

    @property
    def name(self) -> str:
        return f"{self.method} {self.share:.4g} %" if self.method != "source" else "source"


@dataclass
class Measure:
    """What is measured of every model.

    Attributes:
        texts: held-out text, by kind and text.
        tasks: questions by task.
        needles: questions by length in tokens.
        needles_for: of which methods, as a pattern of their names.
        batches, context: to time decoding at, context in tokens.
    """

    source: Source
    texts: Mapping[str, Mapping[str, HeldOut]]
    tasks: Mapping[str, Sequence[Question]]
    needles: Mapping[int, Sequence[Question]]
    needles_for: str
    batches: Sequence[int]
    context: int

    def __call__(
        self,
        name: str,
        share: float,
        model: PreTrainedModel,
        seconds: float,
        decoding: Callable[[PreTrainedModel], PreTrainedModel] | None,
    ) -> Row:
        start = time.perf_counter()
        model = model.to(self.source.model.device)
        found = {
            kind: scores(model, self.source.model, texts) for kind, texts in self.texts.items()
        }
        wanted = self.needles if re.search(self.needles_for, f"{name} {share:.4g} %") else {}
        tokenizer = self.source.tokenizer
        with tf32():
            tasks = {
                task: multiple_choice(model, tokenizer, questions, batch_size=64)
                for task, questions in self.tasks.items()
            }
        with long_texts():
            needles = {
                length: multiple_choice(model, tokenizer, questions, batch_size=16)
                for length, questions in wanted.items()
            }
        took = time.perf_counter() - start
        return Row(name, share, found, tasks, needles, self.speed(model, decoding), (seconds, took))

    def speed(
        self,
        model: PreTrainedModel,
        decoding: Callable[[PreTrainedModel], PreTrainedModel] | None,
    ) -> Sequence[float | str]:
        """Of decoding, for each batch."""
        if decoding is None:
            return ["simulated"] * len(self.batches)
        try:
            return relative_speed(self.source.model, decoding(model), self.batches, self.context)
        except UserError as error:
            return [str(error)] * len(self.batches)

    @property
    def columns(self) -> list[str]:
        """Of the first table."""
        kinds = chain.from_iterable(
            (f"ratio, {kind}", f"KL, {kind}", f"top-1 %, {kind}") for kind in self.texts
        )
        tasks = ["tasks, %", "points lost", "±"] if self.tasks else []
        needles = [f"needles at {length}, %" for length in self.needles]
        speed = [f"decoding at batch {batch}, × source" for batch in self.batches]
        return ["", "bytes, %", *kinds, *tasks, *needles, *speed, "seconds"]

    def cells(self, row: Row, source: Row) -> list[results.Cell]:
        """A row of the first table."""
        cells: list[float | str | None] = [row.share]
        for kind, found in row.scores.items():
            agreements = [text.agreement for text in found.values()]
            cells.append(ratio(found, source.scores[kind]))
            cells.append(fmean(agreement.kl for agreement in agreements))
            cells.append(100 * fmean(agreement.top1 for agreement in agreements))
        if self.tasks:
            drop = paired_drop(list(source.tasks.values()), list(row.tasks.values()))
            mean = fmean(accuracy.normalized for accuracy in row.tasks.values())
            cells += [100 * mean, drop.points, drop.margin]
        for length in self.needles:
            accuracy = row.needles.get(length)
            cells.append(None if accuracy is None else 100 * accuracy.normalized)
        cells += row.speed
        rounded = [float(f"{cell:.5g}") if isinstance(cell, float) else cell for cell in cells]
        return [row.name, *rounded, round(row.seconds[0], 1)]


def paired_table(rows: Sequence[Row]) -> tuple[list[str], list[list[results.Cell]]]:
    """How much more others lose than ours: columns and rows."""
    _, *measured = rows
    kinds = list(rows[0].scores)
    columns = ["", "bytes, %", "beside", "its bytes, %"]
    columns += [f"{loss} above, {kind}" for kind in kinds for loss in ("log loss", "KL")]
    found: list[list[results.Cell]] = []
    for row in measured:
        if row.method.startswith((OURS, HEALED)):
            continue
        for ours in (OURS, HEALED):
            best = beside(measured, ours, row.share)
            if best is None:
                continue
            cells = [
                str(difference(best.scores[kind], row.scores[kind], loss))
                for kind in kinds
                for loss in ("nll", "kl")
            ]
            found.append([row.name, row.share, best.method, best.share, *cells])
    return columns, found


def beside(rows: Sequence[Row], ours: str, share: float) -> Row | None:
    """Our row with the most bytes that are no more than so many percent; of several, the one of
    the least KL on training kinds."""
    candidates = [
        row for row in rows if row.method.startswith(ours) and row.share <= SAME_BYTES * share
    ]

    def order(row: Row) -> tuple[float, float]:
        kl = fmean(text.agreement.kl for text in row.scores[TRAINING_KINDS].values())
        return -round(row.share, 1), kl

    return min(candidates, key=order, default=None)


def texts_of(
    arguments: argparse.Namespace, source: Source, tasks: Mapping[str, Sequence[Question]]
) -> dict[str, dict[str, HeldOut]]:
    """Held-out text by kind and text."""

    def blocks(path: str) -> dict[str, HeldOut]:
        found = valid_blocks(path, source, arguments.length, arguments.valid_blocks)
        return {name: HeldOut(ids) for name, ids in found.items()}

    training, other = blocks(arguments.valid), {}
    for name in arguments.other_sources:
        if name not in training:
            raise SystemExit(f"{arguments.valid} has no source {name}: {', '.join(training)}")
        other[name] = training.pop(name)
    if arguments.other:
        other |= blocks(arguments.other)
    for task, questions in tasks.items():
        other[task] = HeldOut(*question_text(source.tokenizer, questions))
    return {TRAINING_KINDS: training} | ({OTHER_KINDS: other} if other else {})


def needles_of(
    arguments: argparse.Namespace, source: Source, texts: Mapping[str, HeldOut]
) -> dict[int, list[Question]]:
    """Questions by length, hidden in the held-out text."""
    tokenizer = source.tokenizer
    filler = tokenizer.decode(torch.cat([text.ids.flatten() for text in texts.values()]))
    return {
        length: needle_questions(tokenizer, filler, length, arguments.needles_per_depth, seed=0)
        for length in arguments.needles
    }


def arguments_of() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--other", help="held-out text of other kinds, as --valid")
    options.add_argument(
        "--other-sources", nargs="*", default=[], help="sources of --valid that are of other kinds"
    )
    options.add_argument("--shares", nargs="+", type=float, default=[50, 25, 18.75, 12.5, 6.25])
    options.add_argument(
        "--only", default="", metavar="REGEX", help="methods, as a pattern of their names"
    )
    options.add_argument("--healed", nargs="*", default=[], help="SHARE=DIR of healed models")
    options.add_argument("--length", type=int, default=1024, help="tokens of a held-out sequence")
    options.add_argument("--refit-blocks", type=int, default=64, help="sequences to refit on")
    options.add_argument("--tasks", nargs="*", default=[], help="multiple-choice files")
    options.add_argument("--task-limit", type=int, default=500, help="questions of a task")
    options.add_argument(
        "--needles", nargs="*", type=int, default=[], help="lengths of texts that hide a number"
    )
    options.add_argument("--needles-per-depth", type=int, default=2, help="texts, at five depths")
    options.add_argument(
        "--needles-for", default="", metavar="REGEX", help="only in rows of such names"
    )
    options.add_argument(
        "--speed", nargs="*", type=int, default=[], metavar="BATCH", help="also time decoding"
    )
    options.add_argument("--speed-context", type=int, default=2048, help="tokens before it")
    return options.parse_args()


def main() -> None:
    arguments = arguments_of()
    source = load(arguments.source)
    print(f"{device_name()}, {versions()}\n")
    tasks = {
        task_name(file): load_questions(file, arguments.task_limit)
        for file in sorted(arguments.tasks)
    }
    texts = texts_of(arguments, source, tasks)
    needles = needles_of(arguments, source, texts[TRAINING_KINDS])
    timing = arguments.speed, arguments.speed_context
    measure = Measure(source, texts, tasks, needles, arguments.needles_for, *timing)
    counts = {kind: {k: len(text.ids) for k, text in part.items()} for kind, part in texts.items()}
    print(f"<!-- blocks of text: {counts} -->")
    print(results.line(measure.columns))
    print("|---" * len(measure.columns) + "|")

    comparison = Comparison(
        source,
        train_blocks(arguments.train, source, 512, arguments.calibration_blocks),
        train_blocks(arguments.train, source, arguments.length, arguments.refit_blocks),
    )
    rows = [measure("source", 100.0, source.model, 0.0, itself)]
    cells = [measure.cells(rows[0], rows[0])]
    print(results.line(map(results.text, cells[0])), flush=True)
    healed = dict(pair.split("=", 1) for pair in arguments.healed)
    for method in comparison.methods(arguments.shares, healed):
        if not re.search(arguments.only, method.name):
            continue
        start = time.perf_counter()
        try:
            model, floats = method.make()
        except UserError as error:
            reason = f"{method.name} {method.share:.4g} %: not on this model ({error})"
            cells.append([reason, *[None] * (len(measure.columns) - 1)])
        else:
            seconds = time.perf_counter() - start
            share = 100 * floats / comparison.numbers
            rows.append(measure(method.name, share, model, seconds, method.decoding))
            cells.append(measure.cells(rows[-1], rows[0]))
            print(f"<!-- measured in {rows[-1].seconds[1]:.1f} s -->")
        print(results.line(map(results.text, cells[-1])), flush=True)

    columns, pairs = paired_table(rows)
    print(f"\n{results.line(columns)}")
    print("|---" * len(columns) + "|")
    for pair in pairs:
        print(results.line(map(results.text, pair)))
    path = arguments.json
    if path is not None:
        title = f"{Path(arguments.source).stem}: ways to shrink a cache"
        results.save(results.of_this_run(title, measure.columns, cells), path)
        title = f"{title}, what they lose beside tpa-convert at no more bytes"
        results.save(results.of_this_run(title, columns, pairs), results.beside(path))


if __name__ == "__main__":
    main()
