"""Speed against batch and context: what is measured, and what it is compared with."""

from __future__ import annotations

import dataclasses
import json
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.conftest import make_tiny_llama
from tests.conversions import convert_tiny
from tpa_convert.errors import UserError
from tpa_convert.evaluation import sweep
from tpa_convert.evaluation.metrics.cache import cache_bytes
from tpa_convert.evaluation.metrics.capacity import (
    EXACT,
    decode_copies,
    largest_that_fits,
    within_memory,
)
from tpa_convert.evaluation.metrics.speed import Speed
from tpa_convert.evaluation.sweep import SpeedPoint, SpeedReport, sweep_speed, weight_bytes
from tpa_convert.options.bench import BenchOptions
from tpa_convert.pipeline import bench
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


def test_the_largest_batches_have_a_table_of_their_own(models, monkeypatch) -> None:
    """And are asked for only where the user says so."""
    monkeypatch.setattr(sweep, "largest_batch", lambda model, context: 8000 // context)
    settings = {"new_tokens": 1, "repeats": 1}
    assert sweep_speed(models, (1,), (8,), **settings).largest == ()
    report = sweep_speed(models, (1,), (8, 40), **settings, fill=True)
    assert [(x.model, x.context, x.batch) for x in report.largest] == [
        (model, context, 8000 // context) for context in (8, 40) for model in models
    ]
    again = SpeedReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report
    before = report.to_json()
    del before["largest"]  # as earlier versions wrote it
    assert SpeedReport.from_json(before).largest == ()
    console = Console(width=80, record=True)
    console.print(dataclasses.replace(again, largest=(*again.largest[:1], *again.largest[3:])))
    text = console.export_text()
    assert "largest batch" in text
    assert "1,000" in text
    assert "200" in text


@given(largest=st.integers(0, 5000), guess=st.integers(0, 5000))
def test_the_largest_that_fits(largest, guess) -> None:
    asked = []
    found = largest_that_fits(lambda n: asked.append(n) or n <= largest, guess)
    assert found <= largest
    assert largest - found <= found // EXACT
    assert found == 0 or found in asked
    assert len(asked) <= 120
    assert all(n >= 1 for n in asked)


def test_copies_of_a_prompt_decode_side_by_side(models) -> None:
    for model in models.values():
        seen = []
        note = lambda module, given, output, to=seen: to.append(len(output.logits))  # noqa: E731
        hook = model.register_forward_hook(note)
        assert within_memory(lambda one=model: decode_copies(one, 3, 8))
        assert seen == [1, 3, 3]
        hook.remove()


def test_memory_that_is_full_is_told_from_other_errors(monkeypatch) -> None:
    """And what was in it is gone when memory is given back."""
    held, alive = [], []

    def run(kind, text):
        there = torch.zeros(8)
        held.append(weakref.ref(there))
        raise kind(text)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(held[-1]() is not None))
    assert not within_memory(lambda: run(torch.OutOfMemoryError, "x"))
    assert not within_memory(lambda: run(RuntimeError, "Triton Error [CUDA]: out of memory"))
    with pytest.raises(RuntimeError, match="another"):
        within_memory(lambda: run(RuntimeError, "another"))
    assert alive == [False, False, True]


def test_only_the_memory_of_a_gpu_is_filled(tmp_path) -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        bench(tmp_path, BenchOptions(fill=True), device="cpu")


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
