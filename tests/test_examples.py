"""The examples run, and do what they say. The custom architecture has tests of its own."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.command_line import CONVERT, save_source, save_text, tpa_convert
from tests.conversions import random_blocks

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_budgets_in_memory(tmp_path, monkeypatch, capsys) -> None:
    source, text = save_source(tmp_path / "source"), save_text(tmp_path / "text.txt")
    run(
        "in_memory.py", monkeypatch, source, "--text", text, "--ratios", 0.5, 0.25,
        "--length", 32, "--sequences", 4,
    )  # fmt: skip
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()[-5:]]
    assert head == ["cache", "bytes", "a", "token", "perplexity", "KL"]
    found = {name: [float(cell) for cell in cells] for name, *cells in rows}
    assert list(found) == ["source", "int4", "0.5", "0.25"]
    assert found["0.5"][0] == found["source"][0] / 2 == 2 * found["0.25"][0]
    assert 0 == found["source"][-1] < found["0.5"][-1] < found["0.25"][-1]


def test_a_training_loop_of_ones_own_heals(tmp_path, monkeypatch, capsys) -> None:
    source, text = save_source(tmp_path / "source"), save_text(tmp_path / "text.txt")
    small, out = tmp_path / "small", tmp_path / "healed"
    assert tpa_convert("convert", source, *CONVERT, "--out", small).exit_code == 0
    run(
        "own_training_loop.py", monkeypatch, small, source, "--text", text, "--out", out,
        "--steps", 30, "--length", 32,
    )  # fmt: skip
    losses = [float(x) for x in re.findall(r"KL ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (small, out))
    assert type(after) is type(before)
    tokens = random_blocks(count=1, length=8)
    assert not torch.equal(before(tokens).logits, after(tokens).logits)
