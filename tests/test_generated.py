"""The reference for comparisons of generated text refuses models whose text says nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.conftest import make_tiny_llama
from tests.conversions import random_blocks
from tests.generated import (
    check_telling,
    generated,
    make_caches_forget,
    telling,
    with_another_beginning,
)

NEW = 12


@pytest.fixture
def model() -> LlamaForCausalLM:
    model = make_tiny_llama(initializer_range=0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def forgetful_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    make_caches_forget(monkeypatch)


def prompts() -> torch.Tensor:
    return random_blocks(count=2, length=9)


@pytest.mark.usefixtures("forgetful_caches")
def test_a_model_that_repeats_one_token_is_refused(model) -> None:
    """It would let a cache pass that has lost everything."""
    model.lm_head.weight.data.zero_()
    expected = generated(model, prompts(), NEW, use_cache=False)
    assert len(expected.unique()) == 1
    assert torch.equal(generated(model, prompts(), NEW), expected)
    with pytest.raises(AssertionError, match="repeats itself"):
        telling(model, prompts(), NEW, use_cache=False)


@pytest.mark.usefixtures("forgetful_caches")
def test_a_model_that_looks_at_the_last_token_alone_is_refused(model) -> None:
    """Its text varies, and lets the same cache pass."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    expected = generated(model, prompts(), NEW, use_cache=False)
    assert torch.equal(generated(model, prompts(), NEW), expected)
    with pytest.raises(AssertionError, match="depends on its beginning"):
        check_telling(expected, expected)
    with pytest.raises(AssertionError, match=r"depends on its beginning|repeats itself"):
        telling(model, prompts(), NEW, use_cache=False)


@pytest.mark.usefixtures("forgetful_caches")
def test_beside_a_telling_text_a_lost_cache_is_seen(model) -> None:
    expected = telling(model, prompts(), NEW, use_cache=False)
    found = generated(model, prompts(), NEW)
    assert ((found != expected).sum(1) > 0).all()


def test_another_beginning_keeps_the_end_and_the_padding() -> None:
    tokens = prompts()
    mask = torch.ones_like(tokens)
    tokens[0, :4] = mask[0, :4] = 0
    other = with_another_beginning(tokens, 128, mask)
    assert torch.equal(other[:, -1], tokens[:, -1])
    assert torch.equal(other[0, :4], tokens[0, :4])
    assert (other[0, 4:-1] != tokens[0, 4:-1]).all()
    assert (other[1, :-1] != tokens[1, :-1]).all()
    assert other[mask.bool()].min() >= 3
    assert other.max() < 128
