"""The decoder walk against the models' own forward passes, for families that differ in everything
but the interface: windows, scaled embeddings, norms after attention, multipliers, soft-caps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tests.conftest import make_tiny_llama
from tests.conversions import random_blocks
from tests.tiny_models import MODELS, SELF_ATTENTION, SIZES, random_model
from tpa_convert.errors import UserError
from tpa_convert.forward import logits as logits_module
from tpa_convert.forward.head import final_hidden_states
from tpa_convert.forward.passes import CAUSAL_SDPA, block_forward, window_mask
from tpa_convert.forward.walk import DecoderWalk

BLOCKS = random_blocks(count=5, length=32, seed=3)  # windows are of 8


@pytest.fixture(params=SELF_ATTENTION)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def walked(walk: DecoderWalk) -> list[Tensor]:
    """The states before each layer and after the last one."""
    states = []
    for index in range(len(walk.layers)):
        states.append(walk.states.clone())
        walk.advance(index)
    return [*states, walk.states]


def error(walk: DecoderWalk, model: Any) -> float:
    """Largest difference from what the model itself has before each layer and as its logits."""
    expected = model(BLOCKS, output_hidden_states=True)
    states = walked(walk)
    pairs = list(zip(states[:-1], expected.hidden_states[:-1], strict=True))
    logits = torch.cat(list(walk.logits(states[-1]))).view(expected.logits.shape)
    pairs.append((logits, expected.logits))
    return max((found - wanted).abs().max().item() for found, wanted in pairs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_walk_is_the_model(model, attention, monkeypatch) -> None:
    monkeypatch.setattr(logits_module, "CHUNK_ELEMENTS", 7 * 128)  # uneven chunks
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("a model with soft caps")
    model.set_attn_implementation(attention)
    assert error(DecoderWalk(model, BLOCKS, batch_size=2), model) < 1e-5


def test_a_walk_that_ignored_windows_would_be_seen() -> None:
    for family in ("gemma3", "mistral"):
        model = MODELS[family]()
        walk = DecoderWalk(model, BLOCKS, batch_size=2)
        for arguments in walk.arguments:
            arguments["attention_mask"] = None
        assert error(walk, model) > 0.01


def test_a_walk_that_ignored_scaled_embeddings_would_be_seen() -> None:
    for family in ("gemma3", "granite"):
        model = MODELS[family]()
        walk = DecoderWalk(model, BLOCKS, batch_size=2)
        walk.states[:] = torch.nn.functional.embedding(BLOCKS, model.model.embed_tokens.weight)
        assert error(walk, model) > 0.01


def test_a_walk_that_knew_one_kind_of_positions_would_be_seen() -> None:
    model = MODELS["gemma3"]()
    walk = DecoderWalk(model, BLOCKS, batch_size=2)
    walk.arguments[1]["position_embeddings"] = walk.arguments[0]["position_embeddings"]
    assert error(walk, model) > 1e-3


def test_logits_without_their_finish_would_be_seen() -> None:
    for family in ("gemma3", "granite", "cohere"):
        model = MODELS[family]()
        features = final_hidden_states(model, BLOCKS)
        assert (model.lm_head(features) - model(BLOCKS).logits).abs().max() > 0.01


def test_what_attention_gets_and_returns(model) -> None:
    """Observed batch by batch, taken from the layer's input alone, and run again by itself."""
    walk = DecoderWalk(model, BLOCKS, batch_size=2)
    seen: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, args, output: seen.append(output[0]))
        for layer in model.model.layers
    ]
    model(BLOCKS)
    for hook in hooks:
        hook.remove()
    for index in range(len(walk.layers)):
        hidden, keywords = walk.attention_input(index, walk.states[:2].clone())
        calls = list(walk.observe(index))
        assert [len(call.hidden) for call in calls] == [2, 2, 1]
        assert torch.equal(hidden, calls[0].hidden)
        assert keywords.keys() == calls[0].keywords.keys()
        again, _ = walk.attention(index)(hidden, **keywords)
        assert torch.equal(again, calls[0].output)
        torch.testing.assert_close(torch.cat([call.output for call in calls]), seen[index])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_a_layer_of_another_model_in_its_place() -> None:
    model, other = MODELS["gemma3"](), MODELS["gemma3"](seed=1)
    walk = DecoderWalk(model, BLOCKS, batch_size=5)
    found = walk.run(0, walk.states, other.model.layers[0])
    model.model.layers[0] = other.model.layers[0]
    expected = model(BLOCKS, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found, expected)


def test_attention_of_another_name() -> None:
    config = GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    model = random_model(GPTNeoXForCausalLM, config)
    walk = DecoderWalk(model, BLOCKS, batch_size=2, attention="attention")
    assert error(walk, model) < 1e-5
    assert walk.attention(0) is model.gpt_neox.layers[0].attention


def test_layers_that_need_the_text_are_refused() -> None:
    model = make_tiny_llama()
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "tokens": kwargs["input_ids"].float()}),
        with_kwargs=True,
    )
    with pytest.raises(UserError, match="LlamaForCausalLM are called with tokens, which depends"):
        DecoderWalk(model, BLOCKS, batch_size=2)


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_blocks_without_masks_keep_their_windows(family) -> None:
    model = MODELS[family]()
    model.set_attn_implementation("eager")
    expected = model(BLOCKS).logits
    model.set_attn_implementation("sdpa")
    with block_forward(model):
        assert model.config._attn_implementation == CAUSAL_SDPA
        torch.testing.assert_close(model(BLOCKS).logits, expected, rtol=1e-4, atol=1e-5)
        for module in model.modules():
            if hasattr(module, "sliding_window"):
                module.sliding_window = None
        model.config.sliding_window = None
        assert (model(BLOCKS, use_cache=False).logits - expected).abs().max() > 0.01


def test_a_window_counts_the_position_itself() -> None:
    expected = [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert window_mask(3, 2, torch.device("cpu"))[0, 0].int().tolist() == expected
