"""Converted models as engines cache them: the same function with one head of padded components.

vLLM itself is needed by the last test only.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from tests.conftest import make_tiny_llama
from tests.conversions import convert_tiny, random_blocks, random_coded
from tests.tiny_models import MODELS, random_model
from tpa_convert.engines.one_head import (
    OneHeadAttention,
    absorb_gauges,
    absorbed,
    head_size,
    obstacle,
    use_one_head,
)
from tpa_convert.modeling import LayerShape, source_head_dim, source_key_value_heads

SIZES = [24, 40, 64]  # of heads in an engine
TOLERANCE = 1e-4


def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(random_blocks(count=2, length=24, seed=7), use_cache=False).logits


def shape(**fields: Any) -> LayerShape:
    values = {"form": "static", "key_gauge": "applied", "value_gauge": "applied"}
    return LayerShape(
        **(values | {"rank_k": 1, "rank_v": 1, "width_k": 16, "width_v": 16} | fields)
    )


def has_one_head(model: PreTrainedModel) -> bool:
    heads = source_key_value_heads(model.config)
    return all(obstacle(shape, heads) is None for shape in model.config.layer_shapes)


def in_an_engine(model: PreTrainedModel, order: int = 1) -> PreTrainedModel:
    """A model of one head a layer, loaded from the weights of a converted one.

    Args:
        order: in which the files have them, 1 or -1.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    config.tpa_layers = [asdict(absorbed(shape)) for shape in model.config.layer_shapes]
    engine = type(model)(config).eval()
    weights = absorb_gauges(
        list(model.state_dict().items())[::order],
        model.config,
        type(model.get_decoder()).attention_names,
        source_head_dim(model.config),
        source_key_value_heads(model.config),
    )
    engine.load_state_dict(dict(weights))
    use_one_head(engine, lambda shape: head_size(shape, SIZES))
    return engine


def one_key_head(name: str) -> Any:
    """A family whose keys are normalised for each head, with one of them."""
    config = MODELS[name]().config
    config.num_key_value_heads = 1
    return random_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)


HEAD_NORMS = ["gemma3", "qwen3", "qwen3_moe"]
SOURCES = {name: make for name, make in MODELS.items() if name not in HEAD_NORMS} | {
    f"{name}, one key head": partial(one_key_head, name) for name in HEAD_NORMS
}


@pytest.mark.parametrize("name", list(SOURCES))
def test_every_family_computes_the_same(name) -> None:
    model = convert_tiny(SOURCES[name](), kv_floats=14, gauge="applied")
    assert has_one_head(model)
    engine = in_an_engine(model)
    layers = [m for m in engine.modules() if isinstance(m, OneHeadAttention)]
    assert len(layers) == model.config.num_hidden_layers
    assert not any("values.gauge" in weight for weight, _ in engine.named_parameters())
    torch.testing.assert_close(logits(engine), logits(model), atol=TOLERANCE, rtol=TOLERANCE)
    layers[-1].scaling *= 1.5  # a check that this could pass by accident would pass again
    assert not torch.allclose(logits(engine), logits(model), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", HEAD_NORMS)
def test_several_normalised_heads_are_no_single_one(name) -> None:
    assert not has_one_head(convert_tiny(MODELS[name](), kv_floats=14))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "widths",
    [(8, 8), (4, 16), (16, 4)],
    ids=["even", "wide values", "wide keys"],
)
def test_unequal_widths_and_biases(widths, attention) -> None:
    source = make_tiny_llama("gqa", attention_bias=True)
    for name, parameter in source.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model = convert_tiny(source, width_k=widths[0], width_v=widths[1], gauge="applied")
    engine = in_an_engine(model)
    engine.set_attn_implementation(attention)
    torch.testing.assert_close(logits(engine), logits(model), atol=TOLERANCE, rtol=TOLERANCE)


def test_layers_of_different_widths() -> None:
    model = convert_tiny(make_tiny_llama("gqa"), kv_floats=14)
    first, *rest = model.config.layer_shapes
    assert first.width_k > 4
    sizes = {head_size(s, None, multiple=2) for s in (replace(first, width_k=4, width_v=2), *rest)}
    assert len(sizes) == 2


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("gauge", ["absorbed", "applied"])
def test_gauges_are_absorbed_in_any_order_of_the_files(gauge, order) -> None:
    model = convert_tiny(make_tiny_llama("gqa", attention_bias=True), kv_floats=14, gauge=gauge)
    engine = in_an_engine(model, order)
    assert not any("gauge" in name for name, _ in engine.named_parameters())
    torch.testing.assert_close(logits(engine), logits(model), atol=TOLERANCE, rtol=TOLERANCE)


def test_what_is_absorbed_already_stays_as_it_is() -> None:
    model = convert_tiny(make_tiny_llama("gqa"), kv_floats=14, gauge="absorbed")
    names = type(model.get_decoder()).attention_names
    state = model.state_dict()
    weights = dict(absorb_gauges(state.items(), model.config, names, 8, 2))
    assert weights.keys() == state.keys()
    assert all(weights[name] is tensor for name, tensor in state.items())


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"form": "affine"}, "--form static"),
        ({"key_cache": "latent"}, "--key-cache rotated"),
        ({"key_norm": True}, "transformers"),
        (asdict(random_coded().config.layer_shape(0)), "--cache-bits 16"),
    ],
    ids=["contextual", "latent", "norms", "coded"],
)
def test_what_is_no_single_head_is_refused_with_what_helps(fields, advice) -> None:
    assert advice in (obstacle(shape(**fields), kv_heads=2) or "")


def test_one_normalised_head_is_a_single_one() -> None:
    assert obstacle(shape(key_norm=True), kv_heads=1) is None
    assert obstacle(shape(key_norm="all"), kv_heads=2) is None


@given(st.integers(1, 600), st.integers(1, 600), st.sampled_from([None, [32, 64, 80, 600]]))
def test_heads_are_the_smallest_that_hold_keys_and_values(width_k, width_v, sizes) -> None:
    found = head_size(shape(width_k=width_k, width_v=width_v), sizes)
    assert found >= max(width_k, width_v)
    smaller = [s for s in sizes or range(8, 1000, 8) if s < found]
    assert all(s < max(width_k, width_v) for s in smaller)
    assert sizes is None or found in sizes


def test_components_beyond_the_largest_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"70 numbers a token .* at most 64"):
        head_size(shape(width_v=70), SIZES)
