"""Multiple choice from local files, and tasks through lm-evaluation-harness."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tpa_convert.errors import UserError
from tpa_convert.evaluation import (
    Accuracy,
    Drop,
    Question,
    evaluate,
    load_questions,
    multiple_choice,
    paired_drop,
    run_tasks,
)
from tpa_convert.evaluation.metrics import harness
from tpa_convert.evaluation.metrics.multiple_choice import task_name
from tpa_convert.options.evaluation import EvaluationSettings

QUESTIONS = [
    Question("The sky is", ("blue", "a kind of stone", "wet"), 0),
    Question("Q: 1 + 1 =", ("2", "three"), 1),
    Question("Water", ("is dry", "is wet", "burns", "x"), 1),
    Question("Grass is", ("green", "red and very long indeed"), 0),
]


def write(path: Path, rows: list) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


def rows(questions: list[Question]) -> list[dict]:
    return [{"query": q.query, "choices": list(q.choices), "gold": q.gold} for q in questions]


def log_likelihood(model, tokenizer, query: str, choice: str) -> float:
    """One text at a time, without padding."""
    ids = torch.tensor([tokenizer(f"{query} {choice}")["input_ids"]])
    start = len(tokenizer(query)["input_ids"])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(log_p[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_load_questions(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"task{suffix}", rows(QUESTIONS))
    assert load_questions(path) == QUESTIONS
    assert load_questions(path, limit=2) == QUESTIONS[:2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "choices": ["a"]}, "lacks gold"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "line 1"),
        ({"query": "q", "choices": [], "gold": 0}, "line 1"),
        ({"query": "q", "choices": ["a", ""], "gold": 0}, "line 1"),
        ({"query": "q", "choices": "ab", "gold": 0}, "line 1"),
        ({"query": None, "choices": ["a"], "gold": 0}, "line 1"),
    ],
)
def test_bad_questions(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_questions(write(tmp_path / "task.jsonl", [row]))


def test_no_questions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_questions(tmp_path / "task.jsonl")
    with pytest.raises(UserError, match="no text in"):
        load_questions(write(tmp_path / "task.jsonl", []))


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_is_that_of_single_texts(tiny_llama, tiny_tokenizer, seed: int) -> None:
    model = tiny_llama(seed=seed)
    plain = 0
    right = []
    for question in QUESTIONS:
        scores = [
            log_likelihood(model, tiny_tokenizer, question.query, c) for c in question.choices
        ]
        means = [s / len(c.encode()) for s, c in zip(scores, question.choices, strict=True)]
        plain += max(range(len(scores)), key=scores.__getitem__) == question.gold
        right.append(max(range(len(means)), key=means.__getitem__) == question.gold)
    for batch_size in (1, 8):
        result = multiple_choice(model, tiny_tokenizer, QUESTIONS, batch_size=batch_size)
        assert (result.plain, result.normalized) == (plain / 4, sum(right) / 4)
        assert result.right == tuple(right)
        assert result.questions == 4


def test_the_drop_is_paired_and_its_interval_covers_the_truth() -> None:
    def accuracy(right: Tensor) -> Accuracy:
        return Accuracy(right.double().mean().item(), 0.0, tuple(right.tolist()))

    same = [accuracy(torch.tensor([True, False, True]))]
    assert paired_drop(same, same) == Drop(0.0, 0.0)

    # Two tasks; the model flips a tenth of the right answers and a twentieth of the wrong ones.
    generator = torch.Generator().manual_seed(0)
    truth = 100 * ((0.6 * 0.1 - 0.4 * 0.05) + (0.3 * 0.1 - 0.7 * 0.05)) / 2
    drops = []
    for _ in range(400):
        source, model = [], []
        for count, share in ((300, 0.6), (500, 0.3)):
            before = torch.rand(count, generator=generator) < share
            flipped = torch.rand(count, generator=generator) < torch.where(before, 0.1, 0.05)
            source.append(accuracy(before))
            model.append(accuracy(before ^ flipped))
        drops.append(paired_drop(source, model))
        assert drops[-1].points == pytest.approx(
            100 * sum(a.normalized - b.normalized for a, b in zip(source, model, strict=True)) / 2
        )
    covered = sum(abs(drop.points - truth) <= drop.margin for drop in drops) / len(drops)
    assert 0.92 <= covered <= 0.98


def test_errors_of_an_accuracy() -> None:
    assert Accuracy(0.2, 0.0, (True,) + (False,) * 4).standard_error == pytest.approx(
        (0.2 * 0.8 / 5) ** 0.5
    )
    assert Accuracy(1.0, 0.0, (True,) * 5).standard_error == 0


def test_one_answer_less_of_four_has_a_wide_interval() -> None:
    source = [Accuracy(1.0, 0.0, (True,) * 4)]
    drop = paired_drop(source, [Accuracy(0.75, 0.0, (True, True, False, True))])
    assert drop.points == 25
    assert drop.margin == pytest.approx(1.96 * 100 * (0.25 * 0.75 / 4) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("path", "name"),
    [("tasks/arc_easy.jsonl.xz", "arc_easy"), ("quiz.jsonl", "quiz"), (".jsonl", ".jsonl")],
)
def test_tasks_are_called_by_their_files(path: str, name: str) -> None:
    assert task_name(path) == name


def test_a_query_longer_than_the_context_keeps_its_end(tiny_llama, tiny_tokenizer) -> None:
    model = tiny_llama(max_position_embeddings=16)
    long = [
        Question("x" * 100 + q.query[-4:], tuple(c[:4] for c in q.choices), 0) for q in QUESTIONS
    ]
    short = [Question(q.query[-20:], q.choices, 0) for q in long]
    assert multiple_choice(model, tiny_tokenizer, long) == multiple_choice(
        model, tiny_tokenizer, short
    )


# ------------------------------------------------------------------------------- harness

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def local_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = write(tmp_path / "colours.jsonl", rows(QUESTIONS))
    (tmp_path / "colours.yaml").write_text(TASK.format(data=data))
    return tmp_path


def test_harness_runs_a_local_task(tiny_llama, tiny_tokenizer, local_task: Path) -> None:
    models = {f"seed {seed}": tiny_llama(seed=seed) for seed in range(3)}
    results = run_tasks(models, tiny_tokenizer, ["colours"], include_path=local_task)
    for name, model in models.items():
        result = results[name]["colours"]
        ours = multiple_choice(model, tiny_tokenizer, QUESTIONS)
        # The texts are ASCII, where the harness's characters are our bytes.
        assert result.metrics["acc"] == ours.plain
        assert result.metrics["acc_norm"] == ours.normalized
        assert result.headline == "acc_norm"
        assert result.higher_is_better["acc_norm"] is True


def test_harness_limit(tiny_llama, tiny_tokenizer, local_task: Path) -> None:
    model = tiny_llama()
    results = run_tasks({"m": model}, tiny_tokenizer, ["colours"], limit=1, include_path=local_task)
    ours = multiple_choice(model, tiny_tokenizer, QUESTIONS[:1])
    assert results["m"]["colours"].metrics["acc"] == ours.plain


def test_harness_in_the_report(tiny_llama, tiny_tokenizer, local_task: Path) -> None:
    models = {"source": tiny_llama(seed=0), "converted": tiny_llama(seed=1)}
    settings = EvaluationSettings(tasks=["colours"], speed=False, prompt="")
    report = evaluate(models, tiny_tokenizer, settings, include_path=local_task)
    row = report.rows[0]
    assert (row.section, row.name) == ("lm-evaluation-harness", "colours, acc_norm (%)")
    ours = {
        n: 100 * multiple_choice(m, tiny_tokenizer, QUESTIONS).normalized for n, m in models.items()
    }
    assert row.values == ours


def test_tasks_that_cannot_run(tiny_llama, tiny_tokenizer) -> None:
    """One test for two errors: the harness takes seconds to read its list of tasks."""
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="no task nonsense"):
        run_tasks({"m": tiny_llama()}, tiny_tokenizer, ["nonsense"])
    with pytest.raises(UserError, match="cannot run piqa"):
        run_tasks({"m": tiny_llama()}, tiny_tokenizer, ["piqa"])


def test_harness_not_installed(tiny_llama, tiny_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tpa-convert\[eval\]"):
        run_tasks({"m": tiny_llama()}, tiny_tokenizer, ["piqa"])
