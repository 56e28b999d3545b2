"""The benchmark scripts run, on a tiny model; what they print there means nothing."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.command_line import save_source

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("benchmarks") / "source")


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Arguments that name training text and held-out text of two sources."""
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    text = "Some text to train and to measure on, again and again. "
    train.write_text(json.dumps({"text": text * 1000}) + "\n")
    rows = [{"text": text * 100, "source": name} for name in ("news", "docs")]
    valid.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--train", str(train), "--valid", str(valid), "--valid-blocks", "1"]


def output_of(
    script: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    importlib.import_module(script).main()
    return capsys.readouterr().out


def rows(output: str) -> dict[str, float]:
    """Ratio to the source of every row of the tables with perplexities."""
    found = re.findall(r"^\| (.+?) \| \d+ \|(?: [\d.]+ \|){2} ([\d.]+) \|", output, re.MULTILINE)
    return {name: float(ratio) for name, ratio in found}


def test_refinement(model, texts, monkeypatch, capsys, tmp_path) -> None:
    questions = tmp_path / "quiz.jsonl"
    questions.write_text(json.dumps({"query": "Some", "choices": ["text", "tests"], "gold": 0}))
    options = ["--runs", "16:absorbed", "16:measured", "8+6", "--settings", "steps=2"]
    options += ["--refine-blocks", "4", "--tasks", str(questions), "--layers", "1"]
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(importlib.import_module("refine_smollm2"), "MULTIPLE_OF", 2)
    output = output_of("refine_smollm2", [str(model), *texts, *options], monkeypatch, capsys)
    found = rows(output)
    assert found["source"] == 1
    assert {"16:absorbed closed form", "16:measured refined steps=2"} <= found.keys()
    assert "| quiz (1) |" in output


def test_healing(model, texts, monkeypatch, capsys) -> None:
    options = ["--runs", "8+6", "--heal-tokens", "10", "--calibration-blocks", "2"]
    output = output_of("heal_smollm2", [str(model), *texts, *options], monkeypatch, capsys)
    assert list(rows(output)) == ["source", "8+6 one-shot", "8+6 healed on 1e-05 M"]


def test_ablation(model, texts, monkeypatch, capsys) -> None:
    options = ["--floats", "16", "--calibration-blocks", "4", "--block-length", "64"]
    options += ["--sensitivity-blocks", "2", "--refine-at", "16", "--refine-steps", "1"]
    output = output_of(
        "ablation_smollm2",
        [str(model), *texts, *options, "--refine-blocks", "4", "--rows", "^[^:]*$|applied"],
        monkeypatch,
        capsys,
    )
    found = rows(output)
    ablation = sys.modules["ablation_smollm2"]
    assert set(ablation.BASELINES) <= found.keys()
    assert {"+ widths by sensitivity", "+ both", "refined: gauge applied"} <= found.keys()
    verdicts = re.findall(r"\| (keep|drop|mixed) \|$", output, re.MULTILINE)
    assert len(verdicts) >= len(ablation.BASELINES)


@pytest.mark.parametrize(("shape", "hidden_size"), [("135m", 72), ("1b", 256)])
def test_throughput(shape: str, hidden_size: int, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    throughput = importlib.import_module("heal_throughput")
    small = {"intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    small["hidden_size"] = hidden_size
    monkeypatch.setitem(throughput.SHAPES, shape, throughput.SHAPES[shape] | small)
    monkeypatch.setattr(throughput, "LENGTH", 8)
    arguments = ["--shape", shape, "--no-loss", "--variants", "b8-eager", "--steps", "3"]
    output = output_of("heal_throughput", arguments, monkeypatch, capsys)
    pattern = r"^\| 8 \| nothing \| [\d,]+ \| [\d.]+% .* \| (1: .*) \|$"
    [losses] = re.findall(pattern, output, re.MULTILINE)
    assert [entry.split(":")[0] for entry in losses.split(", ")] == ["1", "2", "3"]


def test_objectives(model, texts, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    run = importlib.import_module("tpa_convert.healing.run")
    monkeypatch.setattr(run, "DistillationTrainer", run.DistillationTrainer)  # to be put back
    options = ["--floats", "16", "--calibration-blocks", "2", "--refine-steps", "1"]
    options += ["--heal-tokens", "10", "--rows", "forward|Jensen|labels|states|outputs"]
    output = output_of("objectives_smollm2", [str(model), *texts, *options], monkeypatch, capsys)
    names = ["forward KL", "Jensen-Shannon", "hard labels, 0.1", "hard labels, 0.3"]
    names += ["hidden states", "hidden states, fading", "attention outputs"]
    healed = [f"{name} healed on 1e-05 M" for name in names]
    assert list(rows(output)) == ["source", "refined", *healed]


@pytest.mark.parametrize("name", ["reverse_kl", "skewed_kl", "jensen_shannon"])
def test_gradients_of_divergences(name: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    divergence = getattr(importlib.import_module("objectives_smollm2"), name)
    student, teacher = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    value, gradient = divergence(student.requires_grad_(), teacher)
    torch.testing.assert_close(gradient, torch.autograd.grad(value, student)[0])
    assert value > 0
    assert divergence(teacher, teacher)[0].abs() < 1e-5


def test_hard_labels(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    objectives = importlib.import_module("objectives_smollm2")
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([3, -1, 0, 10])
    value, gradient = objectives.cross_entropy(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
