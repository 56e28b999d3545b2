"""Tables beyond perplexity: what they count against single texts, and rows of known figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.benchmarks import benchmark, run_main
from tests.command_line import CONVERT, save_source, tpa_convert
from tests.conftest import make_tiny_llama
from tests.conversions import random_blocks
from tests.generated import DISTINCT
from tpa_convert.evaluation import Accuracy, multiple_choice

FILLER = "Words upon words, and nothing to find in them. " * 3
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def quality() -> Any:
    return benchmark("common.quality")


def table(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The cells of the rows of the one table that was printed, and of its head."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(rows.pop(1)) == {"---"}
    assert {len(row) for row in rows} == {len(rows[0])}
    return {name: cells for name, *cells in rows}


# ------------------------------------------------------------------------------- positions


def test_scores_by_position(quality, random_tokens) -> None:
    source, other = make_tiny_llama(seed=1), make_tiny_llama(seed=2)
    blocks = random_tokens(3, 20)
    predicted, expected = (m(blocks).logits[:, :-1].log_softmax(-1) for m in (other, source))
    loss, divergence = quality.scores_by_position(other, source, blocks)
    picked = predicted.gather(-1, blocks[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss.float(), -picked.mean(0))
    kl = (expected.exp() * (expected - predicted)).sum(-1).mean(0)
    torch.testing.assert_close(divergence.float(), kl)


def test_positions_are_counted_in_spans(quality, monkeypatch, capsys) -> None:
    """Position p is scored p - 1st, so the span 32–256 starts where the first has ended."""
    scores = {
        "source": torch.stack([torch.full((299,), 1.0), torch.zeros(299)]),
        "other": torch.stack([torch.full((299,), 1.0), torch.full((299,), 0.25)]),
    }
    scores["other"][0, 31:255] += torch.tensor(2.0).log()
    scores["other"][0, 255:] += torch.tensor(3.0).log()
    scores["other"][1, :31] = 0.5
    scores["other"][:, 0] += 31  # the first token that is predicted counts too
    monkeypatch.setattr(quality, "scores_by_position", lambda model, source, part: scores[model])
    blocks = {"a": torch.zeros(1, 300), "b": torch.zeros(2, 300)}
    quality.position_table({"source": "source", "other": "other"}, blocks)
    rows = table(capsys)
    assert rows["perplexity at tokens"] == ["0–32", "32–256", "256–512"]
    assert rows["source"] == ["2.72"] * 3
    assert rows["other"] == [
        "7.39 (×2.718, KL 1.500)",
        "5.44 (×2.000, KL 0.250)",
        "8.15 (×3.000, KL 0.250)",
    ]


# ------------------------------------------------------------------------------- choices


def test_a_table_of_accuracies(quality, monkeypatch, capsys) -> None:
    """The mean over tasks, and the points lost on the same questions."""

    def answered(right: str) -> Accuracy:
        return Accuracy(right.count("1") / len(right), 0.0, tuple(c == "1" for c in right))

    found = {
        "source": {"a": answered("1111"), "b": answered("10101010")},
        "same": {"a": answered("1111"), "b": answered("10101010")},
        "other": {"a": answered("1100"), "b": answered("10101000")},
    }
    monkeypatch.setattr(
        quality,
        "multiple_choice",
        lambda model, tokenizer, questions, batch_size: found[model][questions],
    )
    quality.choice_table("right", {n: n for n in found}, None, {"task a": "a", "task b": "b"})
    rows = table(capsys)
    assert rows["right"] == ["task a", "task b", "mean", "drop"]
    assert rows["source"] == ["100.0", "50.0", "75.00", ""]
    assert rows["same"] == ["100.0", "50.0", "75.00", "0.00 ± 0.00"]
    assert rows["other"][:3] == ["50.0", "37.5", "43.75"]
    points, margin = rows["other"][3].split(" ± ")
    assert points == "31.25"
    assert float(margin) > 0


def test_tasks_are_tables_of_accuracy_and_divergence(quality, monkeypatch, tmp_path) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(quality, "choice_table", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(quality, "question_table", lambda *arguments: calls.append(arguments))
    for name, count in (("b", 3), ("a", 2)):
        rows = [{"query": f"{name}{i}", "choices": ["x", "y"], "gold": 0} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / f"{name}.jsonl") for name in "ba"]
    quality.task_table({"m": "model"}, "tokenizer", files)
    quality.task_table({"m": "model"}, "tokenizer", files, limit=1)
    assert [(call[0], list(call[3])) for call in calls[::2]] == [
        ("accuracy, %", ["a (2)", "b (3)"]),
        ("accuracy, %", ["a (1)", "b (1)"]),
    ]
    for accuracy, divergence in zip(calls[::2], calls[1::2], strict=True):
        assert divergence[:2] == accuracy[1:3] == ({"m": "model"}, "tokenizer")
        assert list(divergence[2]) == ["a", "b"]
        assert list(divergence[2].values()) == list(accuracy[3].values())
    assert [q.query for q in calls[1][2]["b"]] == ["b0", "b1", "b2"]


def test_divergence_on_questions(quality, tiny_llama, tiny_tokenizer, capsys) -> None:
    questions = [
        quality.Question("What is it?", ("a cat", "a dog"), 1),
        quality.Question("And where?", ("far away from here", "there"), 0),
    ]
    models = {"source": tiny_llama(), "same": tiny_llama(), "other": tiny_llama("mqa")}
    quality.question_table(models, tiny_tokenizer, {"quiz": questions, "half": questions[:1]})
    rows = table(capsys)
    assert rows["same"] == ["0.0000"] * 3
    sums, counts = [], []
    for text in ("What is it? a dog", "And where? far away from here"):
        row = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        one, other = (models[n](row).logits[0, :-1].log_softmax(-1) for n in ("source", "other"))
        sums.append((one.exp() * (one - other)).sum().item())
        counts.append(row.shape[1] - 1)
    quiz, half = sum(sums) / sum(counts), sums[0] / counts[0]
    expected = [quiz, half, (quiz + half) / 2]
    assert [float(cell) for cell in rows["other"]] == pytest.approx(expected, abs=1e-4)


def test_needles(quality, tiny_tokenizer) -> None:
    questions = quality.needle_questions(tiny_tokenizer, FILLER, 200, per_depth=2, seed=1)
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
    again = quality.needle_questions(tiny_tokenizer, FILLER, 200, per_depth=2, seed=1)
    assert again == questions
    assert quality.needle_questions(tiny_tokenizer, FILLER, 200, 2, seed=2) != questions


def test_found_needles_are_counted(quality, tiny_llama, tiny_tokenizer, capsys) -> None:
    models = {"source": tiny_llama(), "converted": tiny_llama("mqa")}
    quality.needle_table(models, tiny_tokenizer, FILLER, (150, 200), per_depth=1, seed=3)
    rows = table(capsys)
    assert rows["needles found, % of 5"] == ["150 tokens", "200 tokens", "mean", "drop"]
    for name, model in models.items():
        accuracies = []
        for length in (150, 200):
            questions = quality.needle_questions(tiny_tokenizer, FILLER, length, 1, seed=3)
            accuracy = multiple_choice(model, tiny_tokenizer, questions)
            accuracies.append(100 * accuracy.normalized)
        expected = [f"{a:.1f}" for a in accuracies] + [f"{sum(accuracies) / 2:.2f}"]
        assert rows[name][:3] == expected


# ------------------------------------------------------------------------------- last words


def test_last_words_end_sentences(tiny_tokenizer) -> None:
    last_words = benchmark("common.last_words").last_words
    text = (
        "x" * 990
        + " and then came the evening. Nothing went wrong, but It ended at 5. So. This is new!"
    )
    words = last_words(tiny_tokenizer, [text, text[900:]], count=9)
    said = {tiny_tokenizer.decode(word.ids[-word.size :]) for word in words}
    assert said == {" evening"}  # "new" is short, and 5 and So are no words within a sentence
    assert all(tiny_tokenizer.decode(w.ids).endswith("came the evening") for w in words)


def test_last_words_said_right(quality, tiny_llama, tiny_tokenizer, capsys) -> None:
    """As many as each model says when it is fed one text at a time."""
    tools = benchmark("common.last_words")
    text = FILLER * 8 + "It was all for nothing. They went home again, and found another house. "
    words = tools.last_words(tiny_tokenizer, [text * 3], count=8)
    # Of three words one is what the model says, so that right and wrong ones occur.
    model = tiny_llama(initializer_range=0.3, seed=3)
    row = torch.tensor([words[0].ids])
    said = model(row).logits[0].argmax(-1)[-words[0].size - 1]
    words = [*words, tools.LastWord([*words[0].ids[: -words[0].size], int(said)], 1)]
    found = tools.last_word_accuracy(model, words, batch_size=4)
    expected = []
    for ids, size in words:
        predicted = model(torch.tensor([ids])).logits[0].argmax(-1)
        expected.append(predicted[-size - 1 : -1].tolist() == ids[-size:])
    assert found.right == tuple(expected)
    assert 0 < sum(found.right) < len(words)
    quality.last_word_table({"source": model}, tiny_tokenizer, {"kind": [text * 3], "none": [""]})
    rows = table(capsys)
    assert [column.split()[0] for column in rows["last words, %"]] == ["kind", "mean", "drop"]


# ------------------------------------------------------------------------------- chat


def test_answers_are_greedy_whatever_the_padding(quality, tiny_llama, tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = TEMPLATE
    source = tiny_llama(initializer_range=0.3, seed=3)
    prompts = ["Hello?", "What is that over there?"]
    ids, answers = quality.source_answers(source, tiny_tokenizer, prompts, max_new_tokens=9)
    for prompt, row, answer in zip(prompts, ids, answers, strict=True):
        start = len(f"user: {prompt}\nassistant: ")
        assert tiny_tokenizer.decode(row[:start]) == f"user: {prompt}\nassistant: "
        count = int(answer.sum())
        assert 1 <= count <= 9
        assert answer[start : start + count].all()
        logits = source(row[None]).logits[0]
        assert torch.equal(logits.argmax(-1)[start - 1 : start - 1 + count], row[answer])
        assert len(row[answer].unique()) >= DISTINCT
    assert ids[0][answers[0]].tolist() != ids[1][answers[1]].tolist()


def test_an_answer_ends_with_the_end_of_text(quality, tiny_llama, tiny_tokenizer) -> None:
    """Which belongs to it, and what other answers are padded with does not."""
    tiny_tokenizer.chat_template = TEMPLATE
    source = tiny_llama(initializer_range=0.3, seed=3)
    prompts = ["Hello?", "What is that over there?"]
    ids, answers = quality.source_answers(source, tiny_tokenizer, prompts, max_new_tokens=9)
    first, second = (row[answer].tolist() for row, answer in zip(ids, answers, strict=True))
    ends = first[2]
    assert ends not in first[:2] + second
    source.generation_config.eos_token_id = ends
    ids, answers = quality.source_answers(source, tiny_tokenizer, prompts, max_new_tokens=9)
    found = [row[answer].tolist() for row, answer in zip(ids, answers, strict=True)]
    assert found == [first[:3], second]


def test_agreement_on_answers(quality, tiny_llama, tiny_tokenizer, capsys) -> None:
    tiny_tokenizer.chat_template = TEMPLATE
    prompts = ["Hello?", "What is that over there?"]
    models = {"source": tiny_llama(), "same": tiny_llama(), "other": tiny_llama("mqa")}
    ids, answers = quality.source_answers(models["source"], tiny_tokenizer, prompts, 5)
    quality.chat_table(models, tiny_tokenizer, prompts, max_new_tokens=5)
    rows = table(capsys)
    assert next(iter(rows)) == f"chat, 2 answers, {int(answers.sum())} tokens"

    def predictions(name: str) -> Tensor:
        return models[name](ids).logits[:, :-1].log_softmax(-1)[answers[:, 1:]]

    source, other = predictions("source"), predictions("other")
    kl = (source.exp() * (source - other)).sum(-1).mean().item()
    same = (source.argmax(-1) == other.argmax(-1)).float().mean().item()
    targets = ids[:, 1:][answers[:, 1:]][:, None]
    perplexities = [(-p.gather(-1, targets).mean()).exp().item() for p in (source, other)]
    assert rows["source"] == ["", "", f"{perplexities[0]:.3f}", ""]
    assert rows["same"] == ["0.0000", "100.0", f"{perplexities[0]:.3f}", "×1.000"]
    assert [float(cell.strip("×")) for cell in rows["other"]] == pytest.approx(
        [kl, 100 * same, perplexities[1], perplexities[1] / perplexities[0]], rel=1e-3, abs=1e-3
    )


def test_the_prompts_are_all_different(quality) -> None:
    assert len(set(quality.CHAT_PROMPTS.read_text().splitlines())) == 40


# ------------------------------------------------------------------------------- the script


@pytest.mark.parametrize("chat", [False, True])
def test_all_models_come_to_all_tables(
    quality, chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    source, converted = save_source(tmp_path / "source"), tmp_path / "small"
    assert tpa_convert("convert", source, *CONVERT, "--out", converted).exit_code == 0
    (tmp_path / "valid.txt").write_text(FILLER * 3)
    script, calls = benchmark("quality"), dict[str, Any]()
    tables = ("task_table", "position_table", "last_word_table", "needle_table", "chat_table")
    for name in tables:
        module = script if hasattr(script, name) else quality
        monkeypatch.setattr(
            module, name, lambda *arguments, name=name, **_: calls.update({name: arguments})
        )
    if chat:
        load = script.load

        def with_template(path: str) -> Any:
            loaded = load(path)
            loaded.tokenizer.chat_template = TEMPLATE
            return loaded

        monkeypatch.setattr(script, "load", with_template)
    options = ["--valid", tmp_path / "valid.txt", "--tasks", "quiz.jsonl", "--lengths", 50, 200]
    run_main("quality", monkeypatch, source, converted, *options)
    models = calls["position_table"][0]
    assert all(arguments[0] is models for arguments in calls.values())
    assert list(models) == ["source", "small"]
    expected = make_tiny_llama("gqa")
    tokens = random_blocks(count=1)
    torch.testing.assert_close(models["source"](tokens).logits, expected(tokens).logits)
    assert models["small"].config.cached_bytes == [32, 32]
    assert calls["task_table"][2] == ["quiz.jsonl"]
    [blocks] = calls["position_table"][1].values()
    assert blocks.shape == (2, 200)
    assert [len(part) for part in calls["last_word_table"][2].values()] == [2]
    filler, lengths = calls["needle_table"][2:]
    assert filler.startswith(FILLER[:100])
    assert lengths == [50, 200]
    assert ("chat_table" in calls) == chat
    assert ("no chat template" in capsys.readouterr().out) != chat
