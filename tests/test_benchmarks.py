"""The benchmark scripts run, on a tiny model; what they print there means nothing."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.command_line import CONVERT, save_source, tpa_convert
from tests.conftest import make_tiny_llama
from tpa_convert.plans import plan_to_yaml, plan_widths

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
    runs = ["16:absorbed", "16:measured", "8+6", "16:latent:halfway", "24:affine"]
    options = ["--runs", *runs, "--settings", "steps=2"]
    options += ["--refine-blocks", "4", "--tasks", str(questions), "--layers", "1"]
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(importlib.import_module("smollm2"), "MULTIPLE_OF", 2)
    output = output_of("refine_smollm2", [str(model), *texts, *options], monkeypatch, capsys)
    found = rows(output)
    assert found["source"] == 1
    assert {"16:absorbed closed form", "16:measured refined steps=2"} <= found.keys()
    assert "| quiz (1) |" in output


def test_healing(model, texts, monkeypatch, capsys, tmp_path) -> None:
    options = ["--runs", "8+6", "16:latent", "--heal-tokens", "10", "--refine-blocks", "4"]
    options += ["--refine-steps", "2"]
    options += ["--settings", "seed=1,learning_rate=1e-4"]
    options += ["--refined", str(tmp_path / "refined")]
    arguments = [str(model), *texts, *options]
    output = output_of("heal_smollm2", arguments, monkeypatch, capsys)
    names = ("refined", "seed=1,learning_rate=1e-4 healed on 1e-05 M")
    assert list(rows(output)) == ["source", *(f"{r} {n}" for r in options[1:3] for n in names)]
    again = rows(output_of("heal_smollm2", arguments, monkeypatch, capsys))
    healed = {name: row for name, row in rows(output).items() if "refined" not in name}
    assert again == healed
    assert re.search(r"tokens/s; held-out KL after 0 M [\d.]+, 0 M [\d.]+ -->", output)


def test_run_of_a_plan_file(model, texts, monkeypatch, capsys, tmp_path) -> None:
    plan = tmp_path / "plan.yaml"
    monkeypatch.syspath_prepend(str(FOLDER))
    smollm2 = importlib.import_module("smollm2")
    source = smollm2.load(str(model))
    config = source.architecture.llama_config(source.model.config)
    layers = [(8, 12)] + [(12, 8)] * (config["num_hidden_layers"] - 1)
    uneven = plan_widths(layers, config, key_cache="latent")
    plan.write_text(plan_to_yaml(uneven, {}))
    assert smollm2.plan_of(str(plan), config) == uneven
    assert smollm2.plan_of(f"{plan}:applied", config) == uneven.with_gauge("applied")
    run, options = f"{plan}:applied", ["--refine-steps", "1", "--refine-blocks", "4"]
    options += ["--heal-tokens", "10", "--refined", str(tmp_path / "refined")]
    arguments = [str(model), *texts, "--runs", run, *options]
    output = output_of("heal_smollm2", arguments, monkeypatch, capsys)
    assert list(rows(output)) == ["source", f"{run} refined", f"{run} healed on 1e-05 M"]
    assert [path.name for path in (tmp_path / "refined").iterdir()] == ["plan.yaml-applied-1"]


def test_sampling(model, texts, monkeypatch, capsys, tmp_path) -> None:
    out = tmp_path / "sampled.npy"
    output = output_of(
        "sample_smollm2", [str(model), str(out), "--tokens", "40"], monkeypatch, capsys
    )
    assert "1,024 tokens in" in output
    blocks = np.load(out)
    assert blocks.shape == (1, 1024)
    assert len(np.unique(blocks)) > 10


def test_ablation(model, texts, monkeypatch, capsys) -> None:
    options = ["--floats", "16", "--calibration-blocks", "4", "--block-length", "64"]
    options += ["--sensitivity-blocks", "2", "--refine-at", "16", "--refine-steps", "1"]
    options += ["--refine-blocks", "4"]
    output = output_of(
        "ablation_smollm2",
        [str(model), *texts, *options, "--rows", "^(?!refined)|gauge applied"],
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
    arguments += ["--settings", "seed=1", "seed=2"]
    output = output_of("heal_throughput", arguments, monkeypatch, capsys)
    pattern = r"^\| 8 \| nothing \| seed=\d \| [\d,]+ \| (?:[\d.]+|nan)% .* \| (1: .*) \|$"
    curves = re.findall(pattern, output, re.MULTILINE)
    assert len(curves) == 2
    assert curves[0] != curves[1]
    for losses in curves:
        assert [entry.split(":")[0] for entry in losses.split(", ")] == ["1", "2", "3"]


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("quality")


def cells(output: str, row: str) -> list[str]:
    """The cells of a row of a printed table."""
    line = next(line for line in output.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_needles(quality, tiny_llama, tiny_tokenizer, capsys) -> None:
    filler = "Words upon words, and nothing to find in them. " * 3
    questions = quality.needle_questions(tiny_tokenizer, filler, 200, per_depth=2, seed=1)
    assert len(questions) == 2 * len(quality.DEPTHS)
    for depth, question in zip(quality.DEPTHS * 2, questions, strict=True):
        assert len(set(question.choices)) == quality.CHOICES
        right = f"is {question.choices[question.gold]}."
        assert question.query.count(right) == 1
        assert sum(question.query.count(choice) for choice in question.choices) == 1
        length = len(f"{question.query} {question.choices[0]}")
        assert 200 - quality.SLACK - 2 <= length <= 200  # one token a character
        asked = question.query.rindex("\n\nThe secret")
        needle = len(f"\n\nThe secret number of the old mill {right}\n\n")
        place = question.query.index("\n\nThe secret") / (asked - needle)
        assert place == pytest.approx(depth, abs=0.1)
    again = quality.needle_questions(tiny_tokenizer, filler, 200, per_depth=2, seed=1)
    assert again == questions

    models = {"source": tiny_llama(), "converted": tiny_llama("mqa")}
    quality.needle_table(models, tiny_tokenizer, filler, (150, 200), per_depth=1)
    output = capsys.readouterr().out
    assert "150 tokens | 200 tokens | mean | drop |" in output
    accuracies = [float(cell) for cell in cells(output, "converted")[:3]]
    assert accuracies[2] == pytest.approx(sum(accuracies[:2]) / 2)
    assert re.fullmatch(r"-?[\d.]+ ± [\d.]+", cells(output, "converted")[3])


def test_chat(quality, tiny_llama, tiny_tokenizer, capsys) -> None:
    tiny_tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    source, prompts = tiny_llama(), ["Hello?", "What is that over there?"]
    ids, answers = quality.source_answers(source, tiny_tokenizer, prompts, max_new_tokens=5)
    for prompt, row, answer in zip(prompts, ids, answers, strict=True):
        start = len(f"user: {prompt}\nassistant: ")
        assert tiny_tokenizer.decode(row[:start]) == f"user: {prompt}\nassistant: "
        count = int(answer.sum())
        assert 1 <= count <= 5
        assert answer[start : start + count].all()
        # greedy: each token is the likeliest one, whatever is padded behind it
        logits = source(row[None]).logits[0]
        assert torch.equal(logits.argmax(-1)[start - 1 : start - 1 + count], row[answer])

    models = {"source": source, "same": tiny_llama(), "other": tiny_llama("mqa")}
    quality.chat_table(models, tiny_tokenizer, prompts, max_new_tokens=5)
    output = capsys.readouterr().out
    assert "| chat, 2 answers, " in output
    assert cells(output, "same")[:2] == ["0.0000", "100.0"]
    assert cells(output, "same")[3] == "×1.000"
    assert float(cells(output, "other")[0]) > 0
    assert len(set(quality.CHAT_PROMPTS.read_text().splitlines())) == 40


def test_divergence_on_questions(quality, tiny_llama, tiny_tokenizer, capsys) -> None:
    questions = [
        quality.Question("What is it?", ("a cat", "a dog"), 1),
        quality.Question("And where?", ("far away from here", "there"), 0),
    ]
    models = {"source": tiny_llama(), "same": tiny_llama(), "other": tiny_llama("mqa")}
    quality.question_table(models, tiny_tokenizer, {"quiz": questions, "half": questions[:1]})
    output = capsys.readouterr().out
    assert cells(output, "same") == ["0.0000"] * 3
    sums, counts = [], []
    for text in ("What is it? a dog", "And where? far away from here"):
        row = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        one, other = (models[n](row).logits[0, :-1].log_softmax(-1) for n in ("source", "other"))
        sums.append((one.exp() * (one - other)).sum().item())
        counts.append(row.shape[1] - 1)
    quiz, half = sum(sums) / sum(counts), sums[0] / counts[0]
    expected = [quiz, half, (quiz + half) / 2]
    assert [float(cell) for cell in cells(output, "other")] == pytest.approx(expected, abs=1e-4)


def test_scores_by_position(monkeypatch, random_tokens) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    quality = importlib.import_module("quality")
    source, other = make_tiny_llama(seed=1), make_tiny_llama(seed=2)
    blocks = random_tokens(3, 20)
    predicted, expected = (m(blocks).logits[:, :-1].log_softmax(-1) for m in (other, source))
    loss, divergence = quality.scores_by_position(other, source, blocks)
    picked = predicted.gather(-1, blocks[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss.float(), -picked.mean(0))
    kl = (expected.exp() * (expected - predicted)).sum(-1).mean(0)
    torch.testing.assert_close(divergence.float(), kl)


def test_quality(model, texts, monkeypatch, capsys, tmp_path) -> None:
    converted, questions = tmp_path / "small", tmp_path / "quiz.jsonl"
    assert tpa_convert("convert", model, *CONVERT, "--out", converted).exit_code == 0
    lines = [{"query": "Some", "choices": ["text", "tests"], "gold": i % 2} for i in range(4)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [str(model), str(converted), "--valid", texts[3], "--tasks", str(questions)]
    options += ["--lengths", "150", "200", "--answer-tokens", "2"]
    output = output_of("quality", options, monkeypatch, capsys)
    assert "| accuracy, % | quiz (4) | mean | drop |" in output
    assert "| KL on questions | quiz | mean |" in output
    assert "| perplexity at tokens | 0–32 | 32–256 |" in output
    assert "| needles found, % of 10 | 150 tokens | 200 tokens | mean | drop |" in output
    assert "nan" not in output
    assert output.count("| small |") == 4
    assert "no chat template" in output


def test_objectives(model, texts, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    run = importlib.import_module("tpa_convert.healing.training.preparation")
    monkeypatch.setattr(run, "DistillationTrainer", run.DistillationTrainer)  # to be put back
    options = ["--run", "16:latent", "--calibration-blocks", "2", "--refine-steps", "1"]
    options += ["--heal-tokens", "10", "--rows", "forward|0.3$|Jensen|labels|states|outputs"]
    output = output_of("objectives_smollm2", [str(model), *texts, *options], monkeypatch, capsys)
    names = [
        "forward KL",
        "skewed KL, 0.3",
        "Jensen-Shannon",
        "hard labels, 0.1",
        "hard labels, 0.3",
    ]
    names += ["no hidden states", "hidden states, 10", "attention outputs"]
    healed = [f"{name} healed on 1e-05 M" for name in names]
    assert list(rows(output)) == ["source", "refined", *healed]


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon"])
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
