"""Sensitivities, refit and refinement where layers have windows, norms of queries and keys, scaled
embeddings and norms after attention, and logits a soft cap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.conversions import convert_tiny, random_blocks, source_of, tiny_moments
from tests.tiny_models import MODELS
from tpa_convert.conversion.model import Conversion, convert_model
from tpa_convert.forward.walk import DecoderWalk
from tpa_convert.planning.sensitivity import POSITION_STRIDE, measure_sensitivity
from tpa_convert.plans import Budget, plan_uniform, plan_widths
from tpa_convert.refinement.least_squares import refit
from tpa_convert.refinement.regression import RefinementSettings, refine

BLOCKS = random_blocks(count=4, length=32, seed=3)  # windows are of 8
UNSEEN = random_blocks(count=8, length=32, seed=9)


@pytest.mark.parametrize("key_cache", ["rotated", "latent"])
@pytest.mark.parametrize("family", MODELS)
def test_converted_attention_in_the_source_is_the_converted_model(family, key_cache) -> None:
    """One layer at a time, as plans and refits do it; the source is as before then."""
    source = source_of(MODELS[family]())
    before = source.model(UNSEEN).logits
    sizes = source.family.attention_sizes(source.model.config)
    plan = plan_uniform(sizes, Budget(kv_ratio=0.75), gauge="applied", key_cache=key_cache)
    moments = tiny_moments(source.model)
    conversion = Conversion(source, plan, moments)
    walk = DecoderWalk(source.model, UNSEEN, 4, source.family.names.attention)
    for index in range(len(walk.layers)):
        with conversion.in_place(index):
            walk.advance(index)
    found = torch.cat(list(walk.logits(walk.states))).view_as(before)
    expected = convert_model(source, plan, moments)(UNSEEN).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > 1e-2  # negative control
    assert torch.equal(source.model(UNSEEN).logits, before)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_sensitivity_is_the_loss_of_the_whole_model(part) -> None:
    source = source_of(MODELS["gemma3"]())
    moments = tiny_moments(source.model)
    sensitivity = measure_sensitivity(source, moments, BLOCKS)
    log_p = source.model(BLOCKS).logits[:, ::POSITION_STRIDE].log_softmax(-1)
    config = source.family.attention_sizes(source.model.config)
    for layer in (0, 1):  # with a window, and without
        measured = getattr(sensitivity[layer], part)
        width = measured.widths[0]
        widths = [(16, 16)] * 3
        widths[layer] = (width, 16) if part == "keys" else (16, width)
        model = convert_model(source, plan_widths(widths, config), moments)
        log_q = model(BLOCKS).logits[:, ::POSITION_STRIDE].log_softmax(-1)
        expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean().item()
        assert measured.losses[0] == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert expected > 1e-3


@pytest.mark.parametrize("key_cache", ["rotated", "latent"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_converted_models_are_brought_closer(family, key_cache) -> None:
    source = MODELS[family]()
    reference = source(UNSEEN).logits
    model = convert_tiny(source, kv_floats=16, key_cache=key_cache)

    def error() -> float:
        return (model(UNSEEN).logits - reference).square().mean().item()

    text = random_blocks(count=48, length=32, seed=3)
    errors = [error()]
    reports = [refit(source, model, text)]
    errors.append(error())
    settings = RefinementSettings(steps=40, batch_size=8, valid_share=0.25)
    reports.append(refine(source, model, text, settings))
    errors.append(error())
    assert all(layer.after <= layer.before for report in reports for layer in report)
    assert errors[2] < errors[1] < errors[0]


def test_a_target_that_ignored_windows_would_be_seen() -> None:
    """The converted model refined towards a source without windows ends elsewhere."""
    source = MODELS["gemma3"]()
    reference = source(UNSEEN).logits
    settings = RefinementSettings(steps=40, batch_size=8, valid_share=0.25)
    text = random_blocks(count=48, length=32, seed=3)
    errors = {}
    for window in (8, 1000):
        model, teacher = convert_tiny(source, kv_floats=20), MODELS["gemma3"]()
        teacher.config.sliding_window = window
        refine(teacher, model, text, settings)
        errors[window] = (model(UNSEEN).logits - reference).square().mean().item()
    assert errors[1000] > 1.2 * errors[8], errors
