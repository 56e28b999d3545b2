"""What the attention of a converted layer should return, for each way of using it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conversions import convert_tiny, random_blocks
from tests.tiny_models import BUILT_LIKE, MODELS, SELF_ATTENTION
from tpa_convert.forward.walk import DecoderWalk
from tpa_convert.refinement.regression import RefinementSettings, refine
from tpa_convert.refinement.streams import StreamPair, find_sum

BLOCKS = random_blocks(count=6, length=32, seed=3)
NONE = ["cohere", "cohere2", "exaone4", "flex_olmo", "gemma2", "gemma3", "glm4", "olmo2", "olmo3"]
NONE += ["phi"]
"""Families that norm the output first (EXAONE, Gemma 2, GLM-4, OLMo 2), or run the MLP beside the
attention (Cohere, Phi)."""
SUMS = {name: 0.3 if name == "granite" else 1.0 for name in SELF_ATTENTION if name not in NONE}


def reader(layer: Any) -> Any:
    """The norm behind the sum of stream and attention; Apertus has another name for it."""
    name = "post_attention_layernorm"
    return getattr(layer, name if hasattr(layer, name) else "feedforward_layernorm")


def damaged(model: Any, amount: float = 0.3) -> Any:
    """A copy whose attention lost something."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for layer in copied.model.layers:
        for parameter in layer.self_attn.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += amount * parameter.std() * noise
    return copied


@pytest.mark.parametrize("family", SELF_ATTENTION)
def test_the_sum_is_found_where_there_is_one(family) -> None:
    model = MODELS[family]()
    walk = DecoderWalk(model, BLOCKS, batch_size=4)
    for index, layer in enumerate(model.model.layers):
        found = find_sum(walk, index)
        if family in SUMS:
            assert found is not None
            assert found.reader is reader(layer)
            assert found.multiplier == pytest.approx(SUMS[family], rel=1e-5)
            assert (found.multiplier == 1) == (SUMS[family] == 1)
        else:
            assert found is None
        walk.advance(index)


def middles(model: Any, blocks: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The model's residual streams before each layer and after its attention, by its own pass."""
    seen: list[Tensor] = []
    hooks = [
        reader(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in model.model.layers
    ]
    states = model(blocks, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    return list(states), seen


@pytest.mark.parametrize("family", list(SUMS))
def test_the_target_makes_up_for_what_was_lost_below(family) -> None:
    """Against both models' own passes over all blocks at once."""
    source = MODELS[family]()
    model = damaged(source)
    source_states, source_middles = middles(source, BLOCKS)
    states, _ = middles(model, BLOCKS)
    pair = StreamPair(source, model, BLOCKS, 4)
    for index in range(3):
        target = pair.target(index)
        middle, drift = source_middles[index], states[index] - source_states[index]
        wanted = (middle - states[index]) / SUMS[family]
        scale = middle.square().sum(-1, keepdim=True) + drift.square().sum(-1, keepdim=True)
        torch.testing.assert_close(target.output, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(target.scale, scale / SUMS[family] ** 2, rtol=1e-4, atol=1e-4)
        pair.model.advance(index)
    assert (states[2] - source_states[2]).abs().max() > 0.1  # there was something to make up for


def test_a_llama_is_refined_towards_the_very_streams_of_earlier_versions(tiny_llama) -> None:
    """Bit by bit: published results depend on it."""
    source = tiny_llama("gqa")
    model = convert_tiny(source, kv_floats=14)
    pair = StreamPair(source, model, BLOCKS, 4)
    decoder = source.model
    positions = torch.arange(BLOCKS.shape[1])[None]
    stream = source_stream = decoder.embed_tokens(BLOCKS)
    rotary = decoder.rotary_emb(stream, positions)
    for index, layer in enumerate(decoder.layers):
        drift, middle, after = stream - source_stream, [], []
        hook = layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, middle=middle: middle.append(args[0])
        )
        after = [
            layer(part, position_ids=positions, position_embeddings=rotary)
            for part in source_stream.split(4)
        ]
        hook.remove()
        expected = torch.cat(middle)
        target = pair.target(index)
        assert torch.equal(target.output, expected - stream)
        energies = (x.square().sum(-1, keepdim=True) for x in (expected, drift))
        assert torch.equal(target.scale, sum(energies))
        source_stream = torch.cat(after)
        pair.model.advance(index)
        stream = torch.cat(
            [
                model.model.layers[index](part, position_embeddings=rotary)
                for part in stream.split(4)
            ]
        )
        assert torch.equal(pair.model.states, stream)


@pytest.mark.parametrize("family", ["gemma3", "cohere", "phi"])
def test_without_a_sum_the_target_is_the_sources_own_output(family) -> None:
    source = MODELS[family]()
    pair = StreamPair(source, damaged(source), BLOCKS, 4)
    outputs: list[Tensor] = []
    for layer in source.model.layers:
        layer.self_attn.register_forward_hook(lambda _, args, output: outputs.append(output[0]))
    source(BLOCKS)
    expected = list(outputs)
    for index in range(3):
        target = pair.target(index)
        torch.testing.assert_close(target.output, expected[index])
        energy = expected[index].square().sum(-1, keepdim=True)
        assert bool((target.scale >= 0.999 * energy).all())
        assert target.scale.min() > 1e-3 * energy.mean()
        pair.model.advance(index)


@pytest.mark.parametrize("family", [name for name in SELF_ATTENTION if name not in BUILT_LIKE])
def test_refinement_repairs_every_family(family) -> None:
    source = MODELS[family]()
    model = damaged(source)
    unseen = random_blocks(count=4, length=32, seed=9)
    reference = source(unseen).logits
    before = (model(unseen).logits - reference).square().mean()
    model.requires_grad_(True)
    settings = RefinementSettings(steps=30, batch_size=8, learning_rate=3e-3, valid_share=0.25)
    report = refine(source, model, random_blocks(count=24, length=32, seed=4), settings)
    assert all(layer.after < layer.before for layer in report)
    after = (model(unseen).logits - reference).square().mean()
    assert after < 0.7 * before
