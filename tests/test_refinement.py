"""Layer-wise refinement brings a converted model closer to its source; only attention moves."""

from __future__ import annotations

import pytest
import torch

from tests.conversions import convert_tiny, random_blocks
from tpa_convert.errors import UserError
from tpa_convert.refinement.regression import RefinementSettings, refine, relative_error

SETTINGS = RefinementSettings(steps=40, batch_size=8, learning_rate=3e-3, valid_share=0.25)


@pytest.mark.parametrize(
    "layout",
    [
        {"kv_floats": 14, "gauge": "absorbed"},
        {"kv_floats": 14, "gauge": "applied"},
        {"kv_floats": 20, "form": "affine"},
    ],
)
def test_refinement_brings_logits_closer_on_unseen_text(tiny_llama, layout) -> None:
    source = tiny_llama("gqa")
    model = convert_tiny(source, **layout)
    unseen = random_blocks(count=8, seed=9)
    reference = source(unseen).logits

    def error() -> float:
        return (model(unseen).logits - reference).square().mean().item()

    before = error()
    report = refine(source, model, random_blocks(count=48, seed=3), SETTINGS)
    assert all(layer.after < layer.before for layer in report)
    assert error() < before


def test_only_attention_moves(tiny_llama) -> None:
    source = tiny_llama("gqa")
    model = convert_tiny(source, kv_floats=14)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refine(source, model, random_blocks(count=16), SETTINGS)
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(tensor, before[name])
        assert moved == ("self_attn" in name and "rotary_pair" not in name), name


def test_an_exact_conversion_stays_as_it_is(tiny_llama) -> None:
    """There is nothing to gain, so the held-out error keeps the initial state."""
    source = tiny_llama("gqa")
    model = convert_tiny(source)
    tokens = random_blocks(count=2)
    report = refine(source, model, random_blocks(count=16), SETTINGS)
    assert all(layer.after == layer.before for layer in report)
    torch.testing.assert_close(model(tokens).logits, source(tokens).logits, atol=1e-4, rtol=0)


def test_the_same_seed_gives_the_same_model(tiny_llama) -> None:
    source = tiny_llama("gqa")
    states = []
    for seed in (0, 0, 1):
        model = convert_tiny(source, kv_floats=14)
        settings = RefinementSettings(steps=5, batch_size=4, seed=seed)
        refine(source, model, random_blocks(count=16), settings)
        states.append(model.model.layers[0].self_attn.o_proj.weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_single_block_is_refused(tiny_llama) -> None:
    source = tiny_llama("gqa")
    with pytest.raises(UserError, match="two calibration sequences"):
        refine(source, convert_tiny(source, kv_floats=14), random_blocks(count=1))


def test_relative_error_is_measured_per_token() -> None:
    output, target = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    scale = torch.tensor([[[3.0], [6.0]]])
    assert relative_error(output, target, scale).item() == pytest.approx((1 + 0.5) / 2)


def test_a_single_step_is_a_step(tiny_llama) -> None:
    source = tiny_llama("gqa")
    model = convert_tiny(source, kv_floats=14)
    before = [layer.self_attn.o_proj.weight.clone() for layer in model.model.layers]
    settings = RefinementSettings(steps=1, learning_rate=1e-3)
    report = refine(source, model, random_blocks(count=4), settings)
    assert len(report) == 2
    for layer, weight, found in zip(model.model.layers, before, report, strict=True):
        assert not torch.equal(layer.self_attn.o_proj.weight, weight)
        assert found.after < found.before
