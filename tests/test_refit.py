"""The refit of W_O: least squares, judged on held-out tokens; nothing else moves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conversions import convert_tiny, random_blocks
from tpa_convert.errors import UserError
from tpa_convert.refinement.least_squares import Products, refit, ridge_change


def regression(tokens: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs z, outputs y that are partly linear in them, and the weights of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(tokens, outputs, generator=generator, dtype=torch.float64)
    scale = torch.rand(tokens, 1, generator=generator, dtype=torch.float64) + 0.1
    return z, z @ weight + noise, scale


def products(z: Tensor, y: Tensor, scale: Tensor) -> Products:
    return Products(z.mT @ (z / scale), z.mT @ (y / scale), (y.square() / scale).sum())


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_the_error_is_that_of_the_tokens(inputs, outputs, seed) -> None:
    z, y, scale = regression(30, inputs, outputs, seed)
    weight = torch.randn(inputs, outputs, dtype=torch.float64)
    expected = ((y - z @ weight).square() / scale).sum()
    torch.testing.assert_close(products(z, y, scale).error(weight), expected)


def test_with_much_text_it_is_the_weighted_least_squares_solution() -> None:
    z, y, scale = regression(2000, 5, 3, seed=0)
    root = scale.rsqrt()
    expected = torch.linalg.lstsq(z * root, y * root).solution
    same = products(z, y, scale)
    weight, before, after = ridge_change(same, same, ridges=[1e-9])
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)
    assert after < before


def test_what_holds_only_for_the_training_tokens_is_not_learnt() -> None:
    z, _, scale = regression(12, 10, 3, seed=0)
    unrelated = torch.randn(2, 12, 3, dtype=torch.float64, generator=torch.manual_seed(1))
    other_z = regression(400, 10, 3, seed=2)[0]
    valid = products(other_z, torch.zeros(400, 3, dtype=torch.float64), torch.ones(400, 1))
    weight, before, after = ridge_change(products(z, unrelated[0], scale), valid)
    assert torch.equal(weight, torch.zeros_like(weight))
    assert after == before


@pytest.mark.parametrize(
    "layout",
    [
        {"kv_floats": 14, "gauge": "absorbed"},
        {"kv_floats": 14, "gauge": "applied"},
        {"kv_floats": 20, "form": "affine"},
    ],
)
def test_a_refit_brings_logits_closer_on_unseen_text(tiny_llama, layout) -> None:
    source = tiny_llama("gqa")
    model = convert_tiny(source, **layout)
    unseen = random_blocks(count=8, seed=9)
    reference = source(unseen).logits
    states = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def error() -> float:
        return (model(unseen).logits - reference).square().mean().item()

    before = error()
    report = refit(source, model, random_blocks(count=48, seed=3))
    assert all(layer.after < layer.before for layer in report)
    assert error() < before
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(tensor, states[name])
        assert moved == name.endswith("o_proj.weight"), name


def test_an_exact_conversion_stays_exact(tiny_llama) -> None:
    source = tiny_llama("gqa")
    model = convert_tiny(source)
    tokens = random_blocks(count=2)
    refit(source, model, random_blocks(count=16))
    torch.testing.assert_close(model(tokens).logits, source(tokens).logits, atol=1e-4, rtol=0)


def test_one_block_is_too_few(tiny_llama) -> None:
    source = tiny_llama("gqa")
    with pytest.raises(UserError, match="at least two"):
        refit(source, convert_tiny(source, kv_floats=14), random_blocks(count=1))
