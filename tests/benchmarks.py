"""The scripts in `benchmarks/`, as modules, and figures to hold their tables against."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

FOLDER = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> Any:
    """A script of the folder, or a module of their package `common`."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # as Python does for a script that it runs
    return importlib.import_module(name)


def run_main(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    benchmark(name).main()


WORDS = "A line of text to train and to measure on, again and again, as one does. "


def save_texts(folder: Path) -> list[str]:
    """Arguments that name training text and held-out text of two sources."""
    train, valid = folder / "train.jsonl", folder / "valid.jsonl"
    documents = [WORDS[i:] + WORDS[:i] for i in range(len(WORDS))]
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    rows = [
        {"text": WORDS.title() * 120, "source": "titles"},
        {"text": WORDS * 120, "source": "long"},
    ]
    valid.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--train", str(train), "--valid", str(valid), "--valid-blocks", "1"]


class Figures(NamedTuple):
    """Of a model beside its source, from whole logits."""

    perplexities: dict[str, float]
    kl: float
    top1: float


@torch.no_grad()
def figures(
    model: PreTrainedModel, source: PreTrainedModel, texts: Mapping[str, Tensor]
) -> Figures:
    """Perplexity of every text; KL and the share of equal likeliest tokens over all tokens."""
    perplexities, divergences, same = {}, [], []
    for name, blocks in texts.items():
        log_q, log_p = (m(blocks).logits[:, :-1].double().log_softmax(-1) for m in (model, source))
        loss = -log_q.gather(-1, blocks[:, 1:, None]).mean()
        perplexities[name] = loss.exp().item()
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
        same.append((log_p.argmax(-1) == log_q.argmax(-1)).flatten())
    return Figures(
        perplexities, torch.cat(divergences).mean().item(), torch.cat(same).float().mean().item()
    )


class MeasuredRow(NamedTuple):
    """A row of a table with perplexities: what was measured, and the ratio that is returned."""

    name: str
    model: PreTrainedModel
    floats: float
    ratio: float


def record_rows(monkeypatch: pytest.MonkeyPatch) -> list[MeasuredRow]:
    """A list that fills with the rows of every table."""
    table, found = benchmark("common.tables").Table, []
    plain = table.row

    def row(self: Any, name: str, model: Any, floats: float, seconds: float) -> float:
        ratio = plain(self, name, model, floats, seconds)
        found.append(MeasuredRow(name, copy.deepcopy(model), floats, ratio))
        return ratio

    monkeypatch.setattr(table, "row", row)
    return found
