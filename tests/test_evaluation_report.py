"""Cache bytes, speed, and the report that puts everything side by side."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from rich.console import Console

from tpa_convert.errors import UserError
from tpa_convert.evaluation import (
    EvaluationReport,
    Row,
    SpeedSettings,
    blocks_by_source,
    cache_bytes,
    compare,
    evaluate,
    load_questions,
    measure_speed,
    multiple_choice,
)
from tpa_convert.evaluation.metrics import speed as speed_module
from tpa_convert.evaluation.report import format_ratio, format_value
from tpa_convert.options.evaluation import EvaluationSettings

TEXTS = datasets.Dataset.from_dict(
    {"text": ["some words " * 40, "other words " * 40], "source": ["news", "mail"]}
)
FAST = SpeedSettings(prompt=8, new_tokens=2, repeats=1)


def render(report: EvaluationReport, width: int = 100, color: bool = False) -> str:
    output = io.StringIO()
    system = "standard" if color else None
    Console(width=width, force_terminal=color, color_system=system, file=output).print(report)
    return output.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_keys_and_values(tiny_source_model, dtype) -> None:
    model = tiny_source_model.to(dtype)
    result = cache_bytes(model, tokens=7)
    numbers = 2 * model.config.num_key_value_heads * 8  # head dim 8
    assert result.per_layer == (numbers * dtype.itemsize,) * 2
    assert result.per_token == 2 * numbers * dtype.itemsize
    assert result.numbers == 2 * numbers
    assert f"torch.{result.dtype}" == str(dtype)


def test_a_model_without_a_cache(tiny_llama, monkeypatch) -> None:
    model = tiny_llama()
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **kwargs: forward(**{**kwargs, "use_cache": False})
    )
    with pytest.raises(UserError, match="no key-value cache"):
        cache_bytes(model)


def test_speed_counts_all_tokens_and_not_the_warm_up(tiny_llama, monkeypatch) -> None:
    seconds = iter([(100.0, 100.0, 5.0), (2.0, 8.0, 5.0), (4.0, 2.0, 5.0), (1.0, 4.0, 5.0)])
    monkeypatch.setattr(speed_module, "_time_once", lambda *_: next(seconds))
    settings = SpeedSettings(batch=2, prompt=10, new_tokens=6, repeats=3)
    result = measure_speed({"m": tiny_llama()}, settings)["m"]
    assert result.prefill == 2 * 10 / 2.0
    assert result.decode == 2 * 6 / 4.0
    assert result.cache_bytes == 5.0 * 13 / 10  # halfway through the new tokens


def test_speed_feeds_what_it_says(tiny_llama, monkeypatch) -> None:
    model = tiny_llama(max_position_embeddings=16)
    lengths = []
    forward = model.forward

    def record(**kwargs):
        lengths.append(kwargs["input_ids"].shape)
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", record)
    result = measure_speed({"m": model}, SpeedSettings(batch=3, prompt=99, new_tokens=4, repeats=1))
    assert lengths == ([(3, 12)] + [(3, 1)] * 4) * 2  # the prompt is cut to the context of 16
    assert result["m"].prefill > 0
    assert result["m"].decode > 0


# ------------------------------------------------------------------------------- report


def row(values: list[float | None], higher: bool | None, recovers: bool = False) -> Row:
    return Row("S", "n", "percent", dict(zip("abc", values, strict=False)), higher, recovers)


def test_recovery() -> None:
    accuracy = row([50.0, 40.0, None], True, recovers=True)
    assert accuracy.ratio("b") == pytest.approx(0.8)
    assert accuracy.recovery("b") == pytest.approx(80)
    assert accuracy.recovery("c") is None
    perplexity = row([20.0, 25.0], False, recovers=True)
    assert perplexity.ratio("b") == pytest.approx(1.25)
    assert perplexity.recovery("b") == pytest.approx(80)
    assert row([20.0, 25.0], False).recovery("b") is None
    assert row([None, 25.0], False, recovers=True).recovery("b") is None


def test_numbers() -> None:
    assert format_value(None, "nats") == "–"
    assert format_value(42857.3, "perplexity") == "42,857"
    assert format_value(26.8, "perplexity") == "26.80"
    assert format_value(46080.0, "bytes") == "46,080"
    assert format_ratio(1 / 3, "bytes") == "33.3 %"
    assert [format_ratio(r, "perplexity") for r in (0.987, 1.286, 17.7, 703.2)] == [
        "×0.99",
        "×1.29",
        "×17.7",
        "×703",
    ]


@pytest.fixture
def report(tiny_llama, tiny_tokenizer) -> EvaluationReport:
    models = {"source": tiny_llama("mha"), "converted": tiny_llama("mqa"), "healed": tiny_llama()}
    return evaluate(
        models,
        tiny_tokenizer,
        EvaluationSettings(block_length=32, max_blocks=4, prompt="some"),
        texts=TEXTS,
        timing=FAST,
    )


def test_report_holds_what_was_measured(report, tiny_llama, tiny_tokenizer) -> None:
    rows = {row.name: row for row in report.rows}
    news, mean = rows["news"], rows["geometric mean"]
    assert list(news.values) == ["source", "converted", "healed"]
    product = news.values["converted"] * rows["mail"].values["converted"]
    assert mean.values["converted"] == pytest.approx(product**0.5)
    assert rows["KL divergence (nats per token)"].values["source"] is None
    assert rows["KL divergence (nats per token)"].values["converted"] > 0
    assert rows["bytes per token (float32)"].ratio("converted") == 1 / 4
    assert rows["bytes per token (float32)"].ratio("healed") == 1 / 2
    assert rows["numbers per token and layer"].values["source"] == 64
    assert rows["decode"].values["source"] > 0
    assert list(report.samples) == ["source", "converted", "healed"]


def test_report_matches_its_parts(tiny_llama, tiny_tokenizer, tmp_path: Path) -> None:
    models = {"source": tiny_llama(seed=0), "converted": tiny_llama(seed=1)}
    path = tmp_path / "quiz.jsonl"
    questions = [{"query": f"q{i}", "choices": ["aa", "b", "ccc"], "gold": i % 3} for i in range(9)]
    path.write_text("".join(json.dumps(q) + "\n" for q in questions))
    settings = EvaluationSettings(choices=[path], speed=False, prompt="")
    report = evaluate(models, tiny_tokenizer, settings, texts=TEXTS.select([0]))
    rows = {row.name: row for row in report.rows}
    accuracy = multiple_choice(models["converted"], tiny_tokenizer, load_questions(path))
    assert rows["quiz"].values["converted"] == pytest.approx(100 * accuracy.normalized)
    assert "mean" not in rows
    assert "decode" not in rows
    assert not report.samples
    assert report.settings["block_length"] == 256  # 1024, cut to the models' context
    blocks = blocks_by_source(tiny_tokenizer, TEXTS.select([0]), 256)["news"]
    texts, agreements = compare(models, blocks)
    assert rows["news"].values["source"] == pytest.approx(texts["source"].perplexity)
    label = "KL divergence (nats per token)"
    assert rows[label].values["converted"] == pytest.approx(agreements["converted"].kl)


def test_a_copy_of_the_source_recovers_everything(tiny_llama, tiny_tokenizer) -> None:
    models = {"source": tiny_llama(), "converted": tiny_llama()}
    settings = EvaluationSettings(block_length=32, speed=False)
    report = evaluate(models, tiny_tokenizer, settings, texts=TEXTS)
    rows = {row.name: row for row in report.rows}
    assert rows["geometric mean"].recovery("converted") == pytest.approx(100)
    assert rows["same likeliest token (%)"].values["converted"] == pytest.approx(100)
    assert report.samples["source"] == report.samples["converted"]


def test_json(report) -> None:
    data = json.loads(json.dumps(report.to_json()))
    assert EvaluationReport.from_json(data) == report
    perplexity = next(r for r in data["rows"] if r["name"] == "geometric mean")
    ratio = perplexity["values"]["healed"] / perplexity["values"]["source"]
    assert perplexity["ratio"]["healed"] == pytest.approx(ratio)
    assert perplexity["recovery"]["healed"] == pytest.approx(100 / ratio)
    assert set(perplexity["ratio"]) == {"converted", "healed"}


def test_table_fits_a_terminal_and_needs_no_color(report) -> None:
    text = render(report)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    header = next(line for line in text.splitlines() if "source" in line)
    assert header.split() == [
        "source",
        *("converted", "ratio", "recovery"),
        *("healed", "ratio", "recovery"),
    ]
    cache = next(line for line in text.splitlines() if "bytes per token" in line)
    assert cache.split()[-7:] == ["512", "128", "25.0", "%", "256", "50.0", "%"]
    assert "…" not in text  # nothing is cut off
    assert "some" in text  # the prompt


def test_names_are_not_read_as_markup(report) -> None:
    names = ["data[train]", "a[/b]"]
    rows = tuple(replace(report.rows[0], name=name) for name in names)
    models = ("source", "[red]")
    rows = tuple(replace(row, values=dict.fromkeys(models, 1.0)) for row in rows)
    text = render(replace(report, models=models, rows=rows, samples=dict.fromkeys(models, "x")))
    assert all(name in text for name in names)
    assert text.count("[red]") == 2  # a column and a sample


def test_many_models_take_several_tables(report) -> None:
    names = ["source", *(f"converted-{i}" for i in range(5))]
    rows = tuple(
        replace(row, values=dict.fromkeys(names, row.values["source"]), margins={})
        for row in report.rows
    )
    many = replace(report, models=tuple(names), rows=rows, samples={})
    tables = []
    for width in (80, 120, 300):
        text = render(many, width)
        lines = text.splitlines()
        assert max(map(len, lines)) <= width
        assert "…" not in text
        assert all(any(name in line for line in lines) for name in names)
        tables.append(sum(line.lstrip().startswith("source") for line in lines))
        assert sum(line.startswith("  news") for line in lines) == tables[-1]
    assert tables[0] > tables[1] > tables[2] == 1


def test_color_only_says_better_or_worse(report) -> None:
    red, green = "\x1b[31m", "\x1b[32m"
    lines = render(report, color=True).splitlines()
    cache = next(line for line in lines if "bytes per token" in line)
    assert green in cache
    assert red not in cache


def test_markdown(report) -> None:
    lines = report.to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert table[0].startswith("|  | source | converted | ratio | recovery | healed |")
    assert any(line.startswith("- recovery: ") for line in lines)
    assert any("bytes per token (float32) | 512 | 128 | 25.0 %" in line for line in table)


def test_order_and_names_of_rows(tiny_llama, tiny_tokenizer, tmp_path: Path) -> None:
    paths = [tmp_path / name / "quiz.jsonl" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n' * 3)
    models = {"source": tiny_llama()}
    settings = EvaluationSettings(choices=paths)
    report = evaluate(models, tiny_tokenizer, settings, texts=TEXTS, timing=FAST)
    assert [row.section for row in report.rows] == [
        *["Perplexity"] * 3,
        *["Multiple choice (% right)"] * 3,
        *["Key-value cache, measured"] * 2,
        *["Speed, tokens/s"] * 2,
    ]
    assert [row.name for row in report.rows[3:6]] == [*map(str, paths), "mean"]
    assert report.prompt == "some words some words"  # the last word of 24 tokens is cut


def test_the_drop_stands_under_the_accuracies(tiny_llama, tiny_tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "quiz.jsonl"
    lines = [{"query": f"q{i}", "choices": ["ab", "cd"], "gold": i % 2} for i in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = {"source": tiny_llama(seed=1), "converted": tiny_llama("mqa", seed=2)}
    settings = EvaluationSettings(choices=[path], speed=False, prompt="")
    report = evaluate(models, tiny_tokenizer, settings)
    accuracy, drop = report.rows[:2]
    assert (drop.name, drop.values["source"]) == ("drop (points)", None)
    points, margin = drop.values["converted"], drop.margins["converted"]
    assert points == pytest.approx(accuracy.values["source"] - accuracy.values["converted"])
    assert margin > 0
    shown = next(line for line in render(report, width=80).splitlines() if "drop" in line)
    assert shown.split() == ["drop", "(points)", "–", f"{points:.2f}", "±", f"{margin:.2f}"]
    assert EvaluationReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_bytes_are_counted_in_one_type(tiny_llama, tiny_tokenizer) -> None:
    """That of the saved weights, whatever the models compute in here."""
    models = {"source": tiny_llama(), "converted": tiny_llama("mqa").to(torch.bfloat16)}
    settings = EvaluationSettings(speed=False, prompt="")
    live, saved = (
        evaluate(models, tiny_tokenizer, settings, cache_dtype=dtype).rows[0]
        for dtype in (None, torch.bfloat16)
    )
    assert live.name == "bytes per token (bfloat16, float32)"
    assert saved.name == "bytes per token (bfloat16)"
    assert live.values == {"source": 256, "converted": 64}
    assert saved.values == {"source": 128, "converted": 64}


def test_without_a_source_the_first_is_compared_with(tiny_llama, tiny_tokenizer) -> None:
    models = {"one": tiny_llama(), "other": tiny_llama(seed=1)}
    settings = EvaluationSettings(block_length=32, speed=False, prompt="")
    report = evaluate(models, tiny_tokenizer, settings, texts=TEXTS)
    sections = {row.section for row in report.rows}
    assert "Agreement with one" in sections
    assert not any("source" in section for section in sections)


def test_a_prompt_of_its_own_where_there_is_no_text(tiny_llama, tiny_tokenizer) -> None:
    models = {"source": tiny_llama()}
    report = evaluate(models, tiny_tokenizer, EvaluationSettings(speed=False))
    assert report.prompt
    assert list(report.samples) == ["source"]
