"""Function preservation: every exact case of the design gives the source's logits."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.conftest import make_tiny_llama
from tests.conversions import convert_tiny, random_blocks, source_of, tiny_moments
from tpa_convert.conversion.layer import attention_parameters, convert_layer
from tpa_convert.conversion.model import build
from tpa_convert.decomposition.factors import KeyFactors, ValueFactors, to_complex_pairs
from tpa_convert.modeling import Gauge, LayerShape
from tpa_convert.sources.attention import attention_weights

TOLERANCE = 1e-4


def max_difference(source: LlamaForCausalLM, converted: PreTrainedModel) -> float:
    tokens = random_blocks(count=2, length=33, seed=1)
    with torch.no_grad():
        return (source(tokens).logits - converted(tokens).logits).abs().max().item()


def with_gauge(source_model, gauge: Gauge, maps) -> PreTrainedModel:
    """A full-width static model whose gauge is chosen by `maps(num_heads, head_dim)`.

    `maps` gives, for keys, an invertible complex [f, g, g] (per rotary pair) and for values an
    invertible [g d, g d].
    """
    source = source_of(source_model)
    fields = source.family.attention_sizes(source_model.config)
    groups, head_dim = fields["num_key_value_heads"], fields["head_dim"]
    width, pairs = groups * head_dim, head_dim // 2
    key_map, value_map = maps(groups, head_dim)
    key_gauge = "applied" if fields["key_norm"] else gauge
    shape = LayerShape(
        "static",
        key_gauge,
        gauge,
        groups,
        groups,
        width,
        width,
        key_norm=fields["key_norm"],
        key_pairs=" ".join([str(groups)] * pairs),
    )
    config = source.family.tpa_config(
        source_model.config, [asdict(shape)] * len(source_model.model.layers)
    )
    state = source_model.state_dict()
    parameters = {name: tensor for name, tensor in state.items() if "self_attn" not in name}
    for i, source_layer in enumerate(source_model.model.layers):
        names = source.family.names
        weights = attention_weights(source_layer.self_attn, names, source_model.config, i)
        key_pairs = to_complex_pairs(weights.key, 1)
        keys = KeyFactors(
            feature=torch.einsum("fpg,gfx->fpx", key_map, key_pairs).flatten(0, 1),
            gauge=torch.linalg.inv(key_map).permute(1, 0, 2).flatten(1),
            rotary_pair=torch.arange(pairs).repeat_interleave(groups),
        )
        values = ValueFactors(
            feature=value_map @ weights.value.flatten(0, 1),
            gauge=torch.linalg.inv(value_map).unflatten(0, (groups, head_dim)),
        )
        layer = attention_parameters(weights, keys, values, shape, torch.zeros(0))
        parameters |= {f"model.layers.{i}.self_attn.{k}": v.float() for k, v in layer.items()}
    return build(source.family.causal_lm, config, parameters, source_model)


def identity_maps(groups: int, head_dim: int):
    eye = torch.eye(groups, dtype=torch.complex128).expand(head_dim // 2, -1, -1)
    return eye, torch.eye(groups * head_dim, dtype=torch.float64)


def random_maps(groups: int, head_dim: int):
    generator = torch.Generator().manual_seed(0)
    real, imaginary = (
        torch.randn(head_dim // 2, groups, groups, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    eye, identity = identity_maps(groups, head_dim)
    size = groups * head_dim
    value_map = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return eye + 0.3 * torch.complex(real, imaginary), identity + 0.2 * value_map


@pytest.mark.parametrize("gauge", ["absorbed", "applied"])
@pytest.mark.parametrize("maps", [identity_maps, random_maps])
def test_full_rank_static_is_the_source_in_any_gauge(tiny_source_model, gauge, maps) -> None:
    """R = g, constant head factors, with T = U = 1 and with a random invertible gauge."""
    assert max_difference(tiny_source_model, with_gauge(tiny_source_model, gauge, maps)) < TOLERANCE


def test_a_stray_conjugate_would_be_seen(tiny_llama) -> None:
    """The tests above can fail: conjugating T changes the logits by far more than the tolerance."""
    source = tiny_llama("gqa")

    converted = with_gauge(source, "applied", random_maps)
    for name, parameter in converted.named_parameters():
        if name.endswith("keys.gauge.weight"):
            parameter.data[:, 1] *= -1
    assert max_difference(source, converted) > 100 * TOLERANCE


@pytest.mark.parametrize("method", ["gauge", "svd", "tucker"])
@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("form", ["static", "affine"])
def test_full_width_conversion_is_the_source(tiny_source_model, method, whiten, form) -> None:
    converted = convert_tiny(tiny_source_model, method=method, whiten=whiten, form=form)
    assert max_difference(tiny_source_model, converted) < TOLERANCE


@pytest.mark.parametrize("gauge", ["absorbed", "applied"])
@pytest.mark.parametrize("whiten", [True, False])
def test_full_width_latent_keys_are_the_source(tiny_source_model, gauge, whiten) -> None:
    converted = convert_tiny(tiny_source_model, key_cache="latent", gauge=gauge, whiten=whiten)
    assert max_difference(tiny_source_model, converted) < TOLERANCE


def test_the_constant_part_of_latent_keys_costs_no_cache(tiny_llama) -> None:
    """Keys that are constant but for one direction need one number each, whatever their bias."""
    source = tiny_llama("gqa", attention_bias=True)
    generator = torch.Generator().manual_seed(0)
    for layer in source.model.layers:
        weight = layer.self_attn.k_proj.weight
        left, right = (torch.randn(n, generator=generator) for n in weight.shape)
        weight.data = left.outer(right) / 8
    converted = convert_tiny(source, key_cache="latent", width_k=1, width_v=16)
    assert max_difference(source, converted) < TOLERANCE
    for layer in converted.model.layers:
        layer.self_attn.keys.gauge.offset.data.zero_()
    assert max_difference(source, converted) > 100 * TOLERANCE


@pytest.mark.parametrize("form", ["static", "affine"])
def test_absorbed_and_applied_gauges_agree_below_full_width(tiny_llama, form) -> None:
    source = tiny_llama("gqa")
    moments = tiny_moments(source)
    shape: dict[str, Any] = {"rank_k": 1, "rank_v": 1, "width_k": 8, "width_v": 6}
    tokens = random_blocks(count=2, length=20, seed=2)
    absorbed, applied = (
        convert_tiny(source, form=form, gauge=gauge, moments=moments, **shape)(tokens).logits
        for gauge in ("absorbed", "applied")
    )
    torch.testing.assert_close(absorbed, applied, atol=TOLERANCE, rtol=0)


def test_multi_query_source_needs_rank_one(tiny_llama) -> None:
    """R = 1, a = 1: multi-query attention; the cache is the source's."""
    source = tiny_llama("mqa")
    converted = convert_tiny(source, rank_k=1, rank_v=1)
    assert converted.config.cached_floats == [2 * 8] * 2
    assert max_difference(source, converted) < TOLERANCE


@pytest.mark.parametrize(
    ("config_class", "model_class", "extra"),
    [
        (Qwen2Config, Qwen2ForCausalLM, {}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
        (Phi3Config, Phi3ForCausalLM, {"pad_token_id": 0}),
    ],
)
def test_other_families_are_exact_at_full_width(config_class, model_class, extra) -> None:
    """QKV bias (Qwen2), another class (Mistral), fused QKV (Phi-3)."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        **extra,
    )
    source = model_class(config).eval()
    for name, parameter in source.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    for gauge in ("absorbed", "applied"):
        assert max_difference(source, convert_tiny(source, gauge=gauge)) < TOLERANCE
    assert max_difference(source, convert_tiny(source, key_cache="latent")) < TOLERANCE


def test_output_bias_and_attention_scale_are_kept(tiny_llama) -> None:
    """Llama's attention_bias puts a bias on o too; and c is the source's at another key width."""
    source = tiny_llama("gqa", attention_bias=True)
    assert max_difference(source, convert_tiny(source)) < TOLERANCE
    assert convert_tiny(source, kv_floats=14).model.layers[0].self_attn.scaling == 8**-0.5


@pytest.mark.parametrize("scaling", ["llama3", "yarn", "linear", "dynamic"])
def test_scaled_rope_is_exact(tiny_llama, scaling) -> None:
    rope = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 4.0}
    if scaling != "linear":
        rope["original_max_position_embeddings"] = 16
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    source = tiny_llama("gqa", rope_parameters=rope)
    assert max_difference(source, convert_tiny(source)) < TOLERANCE
    assert max_difference(source, convert_tiny(source, key_cache="latent")) < TOLERANCE


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    groups=st.integers(1, 4),
    heads_per_group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 12]),
    multiple=st.integers(2, 9),
)
def test_full_width_is_exact_for_any_shape(groups, heads_per_group, head_dim, multiple) -> None:
    heads = groups * heads_per_group
    source = make_tiny_llama(
        "gqa",
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        hidden_size=heads * multiple,
    )
    assert max_difference(source, convert_tiny(source)) < TOLERANCE
    assert max_difference(source, convert_tiny(source, key_cache="latent")) < TOLERANCE


def constant_input_model(tiny_llama) -> LlamaForCausalLM:
    """A model whose attention inputs have a constant coordinate, as trained models nearly have."""
    source = tiny_llama("gqa")
    source.model.embed_tokens.weight.data[:, 0] = 3.0
    for layer in source.model.layers:
        layer.self_attn.o_proj.weight.data[0] = 0
        layer.mlp.down_proj.weight.data[0] = 0
        layer.input_layernorm.weight.data[0] = 1.0
    return source


def test_linear_form_is_close_where_inputs_have_a_constant(tiny_llama) -> None:
    """The paper's bias-free layer at full rank: as good as its functional is at giving 1."""
    source = constant_input_model(tiny_llama)
    moments = tiny_moments(source)
    residual = max(layer.constant_residual.item() for layer in moments.layers)
    converted = convert_tiny(source, form="linear", method="svd", moments=moments)
    exact = convert_tiny(source, form="affine", method="svd", moments=moments)
    tokens = random_blocks(count=2, length=33, seed=1)
    reference = source(tokens).logits
    assert (exact(tokens).logits - reference).abs().max() < TOLERANCE
    error = (converted(tokens).logits - reference).square().mean() / reference.var()
    assert residual < 0.2
    assert error < 2 * residual


def test_factored_queries_keep_what_heads_share() -> None:
    """Heads that differ by a factor need one component."""
    model = make_tiny_llama("mha")
    attention = model.model.layers[0].self_attn
    heads = attention.q_proj.weight.data.unflatten(0, (4, -1))
    heads[2], heads[3] = -2 * heads[0], 0.5 * heads[1]
    source = source_of(model)
    weights = attention_weights(attention, source.family.names, model.config, 0)
    moments = tiny_moments(model).layers[0]
    shape = LayerShape("affine", "none", "none", 4, 4, 32, 32)

    def missed(rank: int) -> float:
        parameters, _ = convert_layer(
            weights, moments, replace(shape, rank_q=rank), method="svd", whiten=True
        )
        head_factor = parameters["q_proj.head_factor.bias"].unflatten(0, (rank, 4))
        feature = parameters["q_proj.feature_factor.weight"].unflatten(0, (rank, -1))
        queries = torch.einsum("rh,rdx->hdx", head_factor, feature)
        expected = weights.query[..., :-1]
        return ((queries - expected).norm() / expected.norm()).item()

    assert missed(2) < 1e-6
    assert missed(1) > 0.1
