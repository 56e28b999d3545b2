"""What is predicted of a family is what its conversion is; what cannot be converted is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    DynamicCache,
    Exaone4Config,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3NextConfig,
    StableLmConfig,
    T5Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.conversions import convert_tiny, source_of
from tests.generated import generated, telling
from tpa_convert.conversion.model import convert_model
from tpa_convert.errors import UserError
from tpa_convert.families import Family, add_family, family_of
from tpa_convert.modeling.tpa_llama import TPALlamaForCausalLM
from tpa_convert.options.conversion import ConvertOptions
from tpa_convert.pipeline.prediction import predict
from tpa_convert.plans import Budget, plan_uniform
from tpa_convert.sources.attention import attention_weights

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
FAMILIES = {
    "llama": lambda **kw: LlamaConfig(**COMMON, head_dim=8, **kw),
    "llama-tied": lambda **kw: LlamaConfig(**COMMON, head_dim=16, tie_word_embeddings=True, **kw),
    "llama-biased": lambda **kw: LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, **kw),
    "llama3-rope": lambda **kw: LlamaConfig(**COMMON, rope_parameters=dict(LLAMA3_ROPE), **kw),
    "dynamic-rope": lambda **kw: LlamaConfig(**COMMON, rope_parameters=dict(DYNAMIC_ROPE), **kw),
    "mistral": lambda **kw: MistralConfig(**COMMON, head_dim=16, sliding_window=None, **kw),
    "qwen2": lambda **kw: Qwen2Config(**COMMON, **kw),
    "phi3": lambda **kw: Phi3Config(**COMMON, **kw),
    "phi3-longrope": lambda **kw: Phi3Config(
        **COMMON, original_max_position_embeddings=16, rope_parameters=dict(LONG_ROPE), **kw
    ),
}


def random_model(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start constant, which would hide mistakes
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_bytes_are_those_of_a_live_cache(family: str) -> None:
    config = FAMILIES[family](num_attention_heads=4, num_key_value_heads=2)
    model, tokens = random_model(config), torch.arange(3, 13)[None]
    prediction = predict(config, ConvertOptions(kv_ratio=0.5, cache_bits="16"))
    converted = convert_tiny(model, kv_ratio=0.5)
    for predicted, one in (
        (prediction.source_kv_bytes, model),
        (prediction.kv_bytes, converted),
    ):
        layers = one(tokens, use_cache=True).past_key_values.layers
        measured = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
        assert predicted == 2 * measured / tokens.shape[1]  # 16 bits a number
    assert prediction.source_parameters == model.num_parameters()
    assert prediction.parameters == converted.num_parameters()
    with pytest.raises(
        UserError, match="`rank_q` is at most the number of query heads, 4: give less"
    ):
        predict(config, ConvertOptions(kv_ratio=0.5, form="linear", rank_q=5))


@pytest.mark.parametrize("family", ["llama3-rope", "phi3-longrope"])
@pytest.mark.parametrize("key_cache", ["rotated", "latent"])
def test_generation_beyond_the_length_of_training(family: str, key_cache: str) -> None:
    """Past 16 positions longrope has other factors, and what was cached is of no use.

    With a cache and without one, each as the source has it: in transformers 5.17 the two differ for
    Phi-3, since it forgets the cache but gives the last token alone to the model.
    """
    model = random_model(FAMILIES[family](num_attention_heads=4, num_key_value_heads=2))
    width = 2 * model.config.hidden_size // 4
    converted = convert_tiny(model, width_k=width, width_v=width, key_cache=key_cache)
    tokens = torch.arange(3, 13)[None]
    for one in (model, converted):
        one.generation_config.eos_token_id = None
    for cached in (True, False):
        expected = telling(model, tokens, 40, use_cache=cached)
        assert torch.equal(generated(converted, tokens, 40, use_cache=cached), expected)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "dynamic": DYNAMIC_ROPE,
    "yarn": YARN_ROPE,
    "longrope": LONG_ROPE | {"original_max_position_embeddings": 16},
    "llama3": LLAMA3_ROPE,
    "proportional": {
        "rope_type": "proportional",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
    },
}


def test_every_rope_type_of_transformers_is_tried() -> None:
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("key_cache", ["rotated", "latent"])
@pytest.mark.parametrize("kind", ROPES)
def test_llama_with_every_rope_type(kind: str, key_cache: str) -> None:
    """At full width the source, on texts longer than those that a scaled RoPE was trained on."""
    config = FAMILIES["llama"](
        num_attention_heads=4, num_key_value_heads=2, rope_parameters=dict(ROPES[kind])
    )
    model = random_model(config)
    tokens = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(2))
    expected = model(tokens).logits
    converted = convert_tiny(model, key_cache=key_cache, width_k=16, width_v=16)
    found = converted(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    cache = DynamicCache(config=converted.config)
    steps = [converted(tokens[:, :20], past_key_values=cache, use_cache=True).logits]
    steps += [
        converted(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        for i in range(20, 40)
    ]
    if kind not in ("dynamic", "longrope"):  # whose rotation of old tokens changes with the length
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=0)
    for attention in converted.model.layers:  # a rotation by other angles is seen
        attention.self_attn.table_order = None
    assert (converted(tokens).logits - expected).abs().max() > 1e-2


def test_widths_that_tucker_cannot_make() -> None:
    config = FAMILIES["llama"](num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(UserError, match="cannot make 11 value features of up to 2 heads with"):
        predict(config, ConvertOptions(width_k=8, width_v=11, method="tucker"))


def test_nothing_of_a_source_is_left_out_in_silence() -> None:
    """An attention with a parameter that conversion does not know."""
    model = random_model(FAMILIES["llama"](num_attention_heads=4, num_key_value_heads=2))
    wrong = random_model(FAMILIES["llama-biased"](num_attention_heads=4, num_key_value_heads=2))
    for layer, other in zip(model.model.layers, wrong.model.layers, strict=True):
        layer.self_attn = other.self_attn
    source = source_of(model)
    plan = plan_uniform(source.family.attention_sizes(model.config), Budget(kv_ratio=0.5))
    with pytest.raises(UserError, match=r"^4 tensors .* no place in .* \(the first: .*self_attn\."):
        convert_model(source, plan, None, whiten=False)


def test_fused_rows_that_do_not_fit_are_refused() -> None:
    model = random_model(FAMILIES["phi3"](num_attention_heads=4, num_key_value_heads=2))
    attention = model.model.layers[1].self_attn
    attention.qkv_proj.weight = torch.nn.Parameter(torch.zeros(60, 32))
    names = family_of(model.config).names
    with pytest.raises(UserError, match=r"layer 1: qkv_proj has 60 rows"):
        attention_weights(attention, names, model.config, 1)


REFUSED = {
    "no rotary": (GPT2Config(), "no rotary position embedding"),
    "alibi": (FalconConfig(alibi=True), "falcon"),
    "MLA": (DeepseekV3Config(), "MLA"),
    "encoder-decoder": (T5Config(), "encoder-decoder"),
    "multimodal": (Qwen2VLConfig(), "multimodal"),
    "linear attention": (Qwen3NextConfig(), r"other kinds (linear_attention)"),
    "another build": (FalconConfig(), "docs/custom-architectures.md"),
    "sinks": (GptOssConfig(), "gpt_oss has attention sinks, which"),
    "a hybrid of EXAONE": (Exaone4Config(), "sliding_window has layers without rotation between"),
    "norms of Phi": (PhiConfig(qk_layernorm=True), "qk_layernorm has a LayerNorm"),
    "norms of StableLM": (StableLmConfig(qk_layernorm=True), "qk_layernorm has a LayerNorm"),
    "norms of Cohere": (CohereConfig(use_qk_norm=True), "use_qk_norm has a LayerNorm"),
    "clipped": (OlmoConfig(clip_qkv=8.0), "clip_qkv has queries, keys and values of limited size"),
    "both directions": (
        Gemma3TextConfig(use_bidirectional_attention=True),
        "attention to later tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(UserError) as raised:
        family_of(config)
    message = str(raised.value)
    assert reason in message
    assert "\n" not in message


def test_tpa_is_refused_and_unknown_types_can_be_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tpa_convert.families.family._REGISTRY", {})

    class OtherConfig(LlamaConfig):
        model_type = "other"

    with pytest.raises(UserError, match=r"'other' is unknown .*custom-architectures"):
        family_of(OtherConfig())
    add_family(Family("other", converted=TPALlamaForCausalLM))
    assert family_of(OtherConfig()).model_type == "other"

    class TPAConfig(LlamaConfig):
        model_type = "tpa"

    with pytest.raises(UserError, match="TPA model already"):
        family_of(TPAConfig())
