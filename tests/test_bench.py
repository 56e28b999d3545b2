"""Speed against batch and context: what is measured, and what it is compared with."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from tests.conftest import make_tiny_llama
from tests.conversions import convert_tiny
from tpa_convert.evaluation import sweep
from tpa_convert.evaluation.metrics.cache import cache_bytes
from tpa_convert.evaluation.metrics.speed import Speed
from tpa_convert.evaluation.sweep import SpeedPoint, SpeedReport, sweep_speed, weight_bytes
from tpa_convert.reporting.speed import speed_chart


@pytest.fixture(scope="module")
def models():
    source = make_tiny_llama()
    return {"source": source, "converted": convert_tiny(source, kv_ratio=0.5)}


@pytest.mark.parametrize("static", [False, True])
def test_every_model_is_timed_at_every_batch_and_context(models, static, tmp_path) -> None:
    report = sweep_speed(models, (1, 2), (8, 12), new_tokens=3, repeats=1, static=static)
    assert [(p.batch, p.context, p.model) for p in report.points] == [
        (batch, context, model) for batch in (1, 2) for context in (8, 12) for model in models
    ]
    for point in report.points:
        per_token = cache_bytes(models[point.model]).per_token
        expected = point.batch * (point.context + 1.5) * per_token
        assert point.cache_bytes == pytest.approx(expected, rel=1e-6)
        read = report.weight_bytes[point.model] + point.cache_bytes
        assert point.floor == pytest.approx(read / report.bandwidth)
        assert point.latency == pytest.approx(point.batch / point.decode)
    json.dumps(report.to_json())
    speed_chart(report, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_what_does_not_fit_is_left_out(models, monkeypatch) -> None:
    def measure(chosen, settings):
        if "source" in chosen and settings.batch > 1:
            raise torch.OutOfMemoryError
        return {name: Speed(10.0, 5.0, 100.0) for name in chosen}

    monkeypatch.setattr(sweep, "measure_speed", measure)
    report = sweep_speed(models, (1, 2), (8,))
    assert [(p.batch, p.model) for p in report.points] == [
        (1, "source"),
        (1, "converted"),
        (2, "converted"),
    ]
    assert report.ratio(report.points[1], "decode") == 1.0
    assert report.ratio(report.points[2], "decode") is None
    console = Console(width=120, record=True)
    console.print(report)
    assert "did not fit" in console.export_text()


def test_all_is_there_in_80_columns() -> None:
    """Names of models take more lines, and nothing is cut."""
    name = "a-model-of-135-million-parameters"
    points = [
        SpeedPoint(model, 64, 131072, 191357.0, 15519.3, 0.0116, 1.1e9, 0.005)
        for model in (name, "b")
    ]
    report = SpeedReport("GPU", "bfloat16", False, 3e12, {name: 2e9, "b": 2e9}, tuple(points))
    console = Console(width=80, record=True)
    console.print(report)
    text = console.export_text()
    assert "…" not in text
    assert "64 × 131,072" in text
    assert text.count("15,519.3") == text.count("1,100.0") == 2
    first = "".join(line[:20].strip() for line in text.splitlines()[3:7])
    assert name in first


def test_ratios_are_against_the_first_model() -> None:
    points = [SpeedPoint(m, 1, 8, v, 2 * v, 1.0, 1.0, 0.5) for m, v in (("a", 4.0), ("b", 6.0))]
    report = SpeedReport("CPU", "float32", False, 1e9, {"a": 1.0, "b": 1.0}, tuple(points))
    assert report.ratio(points[1], "prefill") == pytest.approx(1.5)


def test_embeddings_that_are_looked_up_are_not_read(models) -> None:
    tied, untied = make_tiny_llama(tie_word_embeddings=True), make_tiny_llama()
    assert weight_bytes(tied) == sum(p.nbytes for p in tied.parameters())
    table = untied.get_input_embeddings().weight.nbytes
    if untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight:
        assert weight_bytes(untied) == sum(p.nbytes for p in untied.parameters()) - table
