"""Plans of a cache in 16 bits for sources whose weights stay in their files."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.command_line import save_source, save_text
from tests.conftest import make_tiny_tokenizer
from tests.conversions import random_blocks
from tests.tiny_models import MODELS
from tpa_convert import pipeline
from tpa_convert.calibration.moments import collect_moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.forward.comparison import agreement
from tpa_convert.options.planning import PlanOptions
from tpa_convert.planning.search import PlanReport, search
from tpa_convert.refinement.regression import RefinementSettings, refine
from tpa_convert.sources import Source, load_source, on_demand, open_source

TEXT, HELD_OUT = random_blocks(count=8, length=32), random_blocks(count=4, length=32, seed=9)


def saved(family: str, folder: Path) -> Path:
    MODELS[family]().save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def report_of(source: Source, *, refined: bool) -> PlanReport:
    options = PlanOptions(cache_bits="16", multiple_of=4, refine=refined, refine_steps=4)
    return search(
        source,
        collect_moments(source, TEXT),
        HELD_OUT,
        options,
        kv_floats=20,
        curve=[12],
        refinement_text=TEXT,
    )


@pytest.mark.parametrize("refined", [False, True], ids=["converted", "refined"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_source_that_is_not_in_memory_gives_the_same_report(family, refined, tmp_path) -> None:
    """And every candidate is what a model loses that is converted by its plan as a whole."""
    folder = saved(family, tmp_path)
    source, opened = load_source(folder), open_source(folder)
    expected, found = (report_of(one, refined=refined) for one in (source, opened))
    assert found.candidates == expected.candidates
    assert found.chosen == expected.chosen
    for one, other in zip(found.sensitivity, expected.sensitivity, strict=True):
        assert one.keys.losses == other.keys.losses
        assert one.values.losses == other.values.losses
    assert all(parameter.is_meta for parameter in opened.model.parameters())

    moments, losses = collect_moments(source, TEXT), []
    for candidate in expected.candidates:
        model = convert_model(source, candidate.plan, moments)
        if refined:
            refine(source.model, model, TEXT, RefinementSettings(steps=4))
        losses.append(agreement(source.model, model, HELD_OUT).kl)
        assert candidate.kl == pytest.approx(losses[-1], rel=1e-3, abs=1e-7)
    splits = {candidate.split for candidate in expected.candidates}
    assert splits == {"uniform", "halfway", "measured"}
    assert max(losses) > 1.5 * min(losses)  # one model is not like another


@pytest.mark.parametrize("options", [{}, {"refine": True, "refine_steps": 2}, {"target": "llama"}])
def test_one_layer_is_in_memory_at_once(options, tmp_path, monkeypatch) -> None:
    source, text = save_source(tmp_path / "source"), save_text(tmp_path / "text.txt")
    counts: list[int] = []
    hold = on_demand.Part.hold

    def counted(part: on_demand.Part) -> None:
        hold(part)
        [model] = opened
        layers = model.get_decoder().layers
        counts.append(sum(not any(p.is_meta for p in layer.parameters()) for layer in layers))

    opened: list[PreTrainedModel] = []

    def load(*positional, **keywords) -> Source:
        found = load_of_pipeline(*positional, **keywords)
        opened.append(found.model)
        return found

    load_of_pipeline = pipeline.planning.load
    monkeypatch.setattr(pipeline.planning, "load", load)
    monkeypatch.setattr(on_demand.Part, "hold", counted)
    given = {"cache_bits": "16", "kv_ratio": 0.5, "multiple_of": 2, "calibration": [text]}
    chosen = PlanOptions(**given, calibration_blocks=4, block_length=32, **options)
    result = pipeline.plan(str(source), chosen)
    assert result.report.candidates
    assert max(counts) == 1
    assert counts.count(1) > 2 * len(opened[0].get_decoder().layers)
    assert all(parameter.is_meta for parameter in opened[0].parameters())
