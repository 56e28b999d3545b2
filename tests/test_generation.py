"""Generation with transformers' own caches: every way to generate equals recomputing everything."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from tests.conftest import make_tiny_llama
from tests.conversions import convert_tiny, random_blocks
from tests.generated import generated, make_caches_forget, telling
from tpa_convert.modeling import pair_table
from tpa_convert.modeling.tpa_rotary import feature_table

LAYOUTS: dict[str, dict[str, Any]] = {
    "static absorbed": {"kv_floats": 14, "gauge": "absorbed"},
    "static applied": {"kv_floats": 14, "gauge": "applied"},
    "latent absorbed": {"kv_floats": 14, "gauge": "absorbed", "key_cache": "latent"},
    "latent applied": {"kv_floats": 22, "gauge": "applied", "key_cache": "latent"},
    "affine absorbed": {"kv_floats": 20, "form": "affine", "gauge": "absorbed"},
    "affine applied": {"kv_floats": 20, "form": "affine", "gauge": "applied"},
    "paper": {"rank_k": 2, "rank_v": 1, "form": "linear", "method": "svd"},
    "paper with factored queries": {
        "rank_k": 2,
        "rank_v": 1,
        "rank_q": 3,
        "form": "linear",
        "method": "svd",
    },
}
NEW = 12
SPEAKING: dict[str, Any] = {"initializer_range": 0.3, "seed": 3}
"""With these weights the text varies in every layout, mode and padding, which `telling` checks."""


@pytest.fixture(params=list(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def converted(layout: str) -> PreTrainedModel:
    return copy.deepcopy(converted_to(layout))


@cache
def converted_to(layout: str) -> PreTrainedModel:
    model = convert_tiny(make_tiny_llama("gqa", **SPEAKING), **LAYOUTS[layout])
    if model.config.layer_shape(0).form == "affine":  # head factors that do depend on the token
        for name, parameter in model.named_parameters():
            if name.endswith("head_factor.weight"):
                torch.manual_seed(0)
                torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(batch: int = 2, length: int = 9) -> torch.Tensor:
    return random_blocks(count=batch, length=length, seed=5)


def test_every_step_has_the_logits_of_a_full_forward(converted) -> None:
    tokens = prompt(length=20)
    full = converted(tokens, use_cache=False).logits
    output = converted(tokens[:, :7], use_cache=True)
    steps, cache = [output.logits], output.past_key_values
    for t in range(7, 20):
        steps.append(converted(tokens[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(converted, implementation) -> None:
    tokens = prompt()
    reference = converted(tokens).logits
    converted.set_attn_implementation(implementation)
    torch.testing.assert_close(converted(tokens).logits, reference, atol=1e-5, rtol=1e-5)
    expected = telling(converted, tokens, NEW, use_cache=False)
    assert torch.equal(generated(converted, tokens, NEW), expected)


def test_the_live_cache_is_as_small_as_the_config_says(converted) -> None:
    tokens = prompt(length=16)
    cache = converted(tokens, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    for layer, floats in zip(cache.layers, converted.config.cached_floats, strict=True):
        nbytes = layer.keys.nbytes + layer.values.nbytes
        assert nbytes == floats * tokens.numel() * 4
        assert floats < 2 * 2 * 8 or converted.config.layer_shape(0).form == "linear"


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beam": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
}
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    **{way: (way, {}) for way in WAYS},
    "static cache": ("greedy", {"cache_implementation": "static", "disable_compile": True}),
    "chunked prefill": ("greedy", {"prefill_chunk_size": 4}),
}
"""A way to generate, and how the cache takes part in it."""


PADDINGS = {
    "full": slice(0),
    "left-padded": slice(4),
    "padded inside": slice(3, 6),  # as a chat whose answers end early
}


def padded_prompt(padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask."""
    tokens = prompt()
    mask = torch.ones_like(tokens)
    tokens[0, PADDINGS[padding]], mask[0, PADDINGS[padding]] = 0, 0
    return tokens, mask


@cache
def uncached(layout: str, padding: str, way: str) -> torch.Tensor:
    tokens, mask = padded_prompt(padding)
    options = {"attention_mask": mask, "use_cache": False, **WAYS[way]}
    return telling(converted_to(layout), tokens, NEW, **options)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("padding", PADDINGS)
def test_generation_equals_the_uncached_result(converted, layout, mode, padding) -> None:
    way, settings = MODES[mode]
    tokens, mask = padded_prompt(padding)
    found = generated(converted, tokens, NEW, attention_mask=mask, **WAYS[way], **settings)
    assert torch.equal(found, uncached(layout, padding, way))


def test_a_cache_that_loses_its_values_would_be_seen(converted, monkeypatch) -> None:
    """The tests above can fail, in every layout and for every prompt."""
    expected = telling(converted, prompt(), NEW, use_cache=False)
    make_caches_forget(monkeypatch)
    assert (generated(converted, prompt(), NEW) != expected).any(1).all()


def test_a_cache_of_right_padded_prompts_continues(converted) -> None:
    tokens, mask = prompt(), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    positions = mask.cumsum(-1) - 1
    cache = converted(
        tokens, attention_mask=mask, position_ids=positions, use_cache=True
    ).past_key_values
    more = prompt(length=12)[:, 9:]
    mask = torch.cat((mask, torch.ones_like(more)), 1)
    steps = converted(
        more, attention_mask=mask, position_ids=mask.cumsum(-1)[:, 9:] - 1, past_key_values=cache
    ).logits
    alone = converted(torch.cat((tokens[:1, :6], more[:1]), 1), use_cache=False).logits
    torch.testing.assert_close(steps[:1], alone[:, 6:], atol=1e-5, rtol=1e-5)
    whole = converted(torch.cat((tokens[1:], more[1:]), 1), use_cache=False).logits
    torch.testing.assert_close(steps[1:], whole[:, 9:], atol=1e-5, rtol=1e-5)


def test_static_cache_with_chunked_prefill(converted) -> None:
    tokens = prompt()
    expected = telling(converted, tokens, NEW, use_cache=False)
    out = generated(
        converted,
        tokens,
        NEW,
        cache_implementation="static",
        prefill_chunk_size=4,
        disable_compile=True,
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("layout", ["static applied", "latent absorbed", "paper"])
def test_static_cache_compiles_as_one_graph(tiny_llama, layout) -> None:
    model = convert_tiny(tiny_llama("gqa"), **LAYOUTS[layout])
    tokens = prompt(length=6)
    expected = model(tokens, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(tokens[:, :4], past_key_values=cache)
    step = torch.compile(model, fullgraph=True, backend="eager")
    for t in (4, 5):
        positions = torch.tensor([[t]])
        logits = step(tokens[:, t : t + 1], past_key_values=cache, position_ids=positions).logits
        torch.testing.assert_close(logits[:, 0], expected[:, t], atol=1e-5, rtol=1e-5)


def test_latent_keys_refuse_positions_of_the_last_token_only(tiny_llama) -> None:
    model = convert_tiny(tiny_llama("gqa"), **LAYOUTS["latent absorbed"])
    tokens = prompt(batch=1)
    cache = model(tokens, use_cache=True).past_key_values
    hidden = model.model.embed_tokens(tokens[:, -1:])
    last = model.model.rotary_emb(hidden, torch.tensor([[tokens.shape[1]]]))
    attention = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match="need the positions of everything cached"):
        attention.keys.expand(cache.layers[0].keys, feature_table(pair_table(last, 4)))


def test_assisted_and_prompt_lookup(converted, tiny_llama) -> None:
    tokens = prompt(batch=1)
    expected = telling(converted, tokens, NEW, use_cache=False)
    assistant = tiny_llama("gqa", **SPEAKING)
    assistant.generation_config.eos_token_id = None
    for assistance in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(generated(converted, tokens, NEW, **assistance), expected)


def test_a_converted_model_assists_its_source(converted, tiny_llama) -> None:
    source = tiny_llama("gqa", **SPEAKING)
    source.generation_config.eos_token_id = None
    tokens = prompt(batch=1)
    expected = telling(source, tokens, NEW)
    assert torch.equal(generated(source, tokens, NEW, assistant_model=converted), expected)


def test_eager_attention_returns_its_weights(converted) -> None:
    converted.set_attn_implementation("eager")
    output = converted(prompt(), output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2
    assert output.attentions[0].shape == (2, 4, 9, 9)
    assert len(output.hidden_states) == 3


def test_quantised_cache_is_smaller_and_close(tiny_llama) -> None:
    pytest.importorskip("hqq", reason="quantised caches of 8 bits need hqq")
    from transformers import QuantizedCache

    model = convert_tiny(tiny_llama("gqa", head_dim=64), width_k=64, width_v=64)
    tokens = prompt(length=65)
    reference = model(tokens, use_cache=False).logits
    full = model(tokens[:, :-1], use_cache=True).past_key_values
    cache = QuantizedCache("hqq", model.config, nbits=8, q_group_size=64, residual_length=1)
    model(tokens[:, :-1], past_key_values=cache)
    logits = model(tokens[:, -1:], past_key_values=cache).logits
    error = (logits[:, 0] - reference[:, -1]).abs().max() / reference.std()
    assert 0 < error < 0.2
    plain = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    assert quantised_bytes(cache) < 0.5 * plain


def quantised_bytes(cache) -> int:
    total = 0
    for layer in cache.layers:
        total += layer.keys.nbytes + layer.values.nbytes  # the unquantised tail
        for packed, _ in (layer._quantized_keys, layer._quantized_values):
            total += packed.nbytes
    return total


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_cache_offload(converted, implementation) -> None:
    model = converted.cuda()
    tokens = prompt().cuda()
    expected = telling(model, tokens, NEW, use_cache=False)
    out = generated(
        model,
        tokens,
        NEW,
        cache_implementation=implementation,
        disable_compile=True,  # compiling an offloaded static cache crashed torch 2.11
    )
    assert torch.equal(out, expected)


def test_per_layer_shapes_survive_saving(tiny_llama, tmp_path) -> None:
    from tests.conversions import source_of, tiny_moments
    from tpa_convert.conversion.model import convert_model
    from tpa_convert.modeling import LayerShape
    from tpa_convert.plans import Plan

    source = source_of(tiny_llama("gqa"))
    first = LayerShape("static", "absorbed", "absorbed", 1, 1, 8, 4)
    second = LayerShape("affine", "applied", "applied", 1, 1, 12, 4)
    plan = Plan([first, second], 2, 8)
    model = convert_model(source, plan, tiny_moments(source.model))
    tokens = prompt()
    expected = telling(model, tokens, NEW, use_cache=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.cached_floats == [12, 12 + 4 + 4]
    assert torch.equal(generated(loaded, tokens, NEW), expected)
    assert [shape.width_k for shape in copy.deepcopy(loaded.config).layer_shapes] == [8, 12]
