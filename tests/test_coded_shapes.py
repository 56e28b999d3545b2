"""Coded caches of sources of odd shapes, odd texts and odd types: what a hostile user would try."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM, PreTrainedModel, StaticCache

from tests.conftest import make_tiny_llama
from tests.conversions import coded_moments, convert_coded, random_blocks
from tests.tiny_models import MODELS, SIZES, random_model
from tpa_convert.forward.comparison import agreement

TOLERANCE = 1e-4
PARTIAL = Phi3Config(**SIZES | {"hidden_size": 48}, partial_rotary_factor=0.5)
SOURCES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "one layer": (lambda: make_tiny_llama(num_hidden_layers=1), {}),
    "one key head": (lambda: make_tiny_llama("mqa"), {"kv_ratio": 0.5}),
    "the fewest bytes": (lambda: make_tiny_llama("mqa"), {"kv_bytes": 16}),
    "heads of 12": (lambda: make_tiny_llama(head_dim=12), {"key_blocks": 6}),
    "heads of 24": (lambda: make_tiny_llama(head_dim=24), {"key_blocks": 3}),
    "heads of 2": (lambda: make_tiny_llama(head_dim=2), {"kv_ratio": 1.0}),
    "a part of each head rotated": (
        lambda: random_model(Phi3ForCausalLM, PARTIAL),
        {"key_blocks": 2},
    ),
    "biases": (MODELS["qwen2"], {"key_blocks": 4}),
    "8 bits": (make_tiny_llama, {"bits": 8, "kv_ratio": 0.5}),
    "3 bits": (make_tiny_llama, {"bits": 3, "kv_ratio": 0.5, "key_blocks": 4}),
    "1 bit, more blocks than codes": (
        make_tiny_llama,
        {"bits": 1, "kv_ratio": 0.13, "key_blocks": 4},
    ),
    "all bytes": (make_tiny_llama, {"kv_ratio": 1.0}),
}


def runs_alike(model: PreTrainedModel, length: int) -> Tensor:
    """The logits without a cache, which token by token and with a static cache are the same."""
    tokens = random_blocks(count=2, length=length, seed=3)
    dynamic, static = DynamicCache(), StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        steps = [model(tokens[:, i : i + 1], past_key_values=dynamic).logits for i in range(length)]
        positions = torch.arange(length)[None]
        whole = model(tokens, past_key_values=static, position_ids=positions).logits
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(whole, expected, atol=TOLERANCE, rtol=0)
    return expected


@pytest.mark.parametrize("name", SOURCES)
def test_odd_shapes(name) -> None:
    make, options = SOURCES[name]
    source = make()
    model = convert_coded(source, **options).double()
    for length in (1, 2, 7, 19):
        runs_alike(model, length)
    out = model.generate(random_blocks(count=1, length=1), max_new_tokens=3, pad_token_id=0)
    assert out.shape[1] > 1
    # negative control of the comparison: a token more at the beginning
    tokens = random_blocks(count=2, length=19, seed=3)
    with torch.no_grad():
        shifted = model(tokens.roll(1, 1), use_cache=False).logits[:, -1]
        assert (shifted - model(tokens, use_cache=False).logits[:, -1]).abs().max() > TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_of_16_bits_lose_little_more(dtype) -> None:
    """Importances in nats would be too small for float16, whose least number is 6e-8."""
    blocks = random_blocks(count=8, length=32, seed=9)
    source = make_tiny_llama()
    moments = coded_moments(source)
    for layer in moments.layers:  # as in a large model, where a token's errors cost next to nothing
        object.__setattr__(layer, "key_metric", 1e-9 * layer.key_metric)
        object.__setattr__(layer, "value_metric", 1e-9 * layer.value_metric)
    losses = [
        agreement(source, convert_coded(source, moments=moments, dtype=one).float(), blocks).kl
        for one in (torch.float32, dtype)
    ]
    assert losses[1] < 1.2 * losses[0] + 1e-3
    model = convert_coded(source, moments=moments, dtype=dtype)
    assert model.dtype == dtype
    for attention in (layer.self_attn for layer in model.model.layers):
        for coder in (attention.keys.coder, attention.values.coder):
            assert (coder.importance > 0).all()
            assert (coder.step > 0).all()
    for attention in (layer.self_attn for layer in model.model.layers):
        attention.keys.coder.importance.zero_()  # negative control: what underflow would leave
        attention.values.coder.importance.zero_()
    assert agreement(source, model.float(), blocks).kl > 1.5 * losses[0]


@pytest.mark.parametrize("part", ["k_proj", "v_proj", "o_proj"])
def test_layers_whose_projections_are_zero(part) -> None:
    """Nothing varies, or no error costs anything; the other layer is coded as ever."""
    source = make_tiny_llama()
    getattr(source.model.layers[0].self_attn, part).weight.data.zero_()
    model = convert_coded(source, kv_ratio=0.5).double()
    assert all(parameter.isfinite().all() for parameter in model.state_dict().values())
    runs_alike(model, 9)
    blocks = random_blocks(count=8, length=32, seed=9)
    lost = agreement(source, model.float(), blocks).kl
    assert lost < 0.2 * agreement(source, make_tiny_llama(), blocks).kl


@pytest.mark.parametrize("length", [2, 3, 33])
def test_texts_that_say_little(length) -> None:
    """One ordinary token is no spread at all; the conversion works, and loses accordingly."""
    source = make_tiny_llama()
    moments = coded_moments(source, random_blocks(count=1, length=length))
    model = convert_coded(source, moments=moments).double()
    assert runs_alike(model, 9).isfinite().all()
