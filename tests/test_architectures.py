"""Every family, seen through Llama's names, computes what it computed; what cannot is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from tests.conftest import HEAD_SHAPES
from tests.conversions import convert_tiny, source_of
from tests.generated import generated, telling
from tpa_convert.conversion.model import convert_model
from tpa_convert.errors import UserError
from tpa_convert.families import Architecture, architecture_of, register_architecture
from tpa_convert.options.recipe import ConvertOptions
from tpa_convert.pipeline.prediction import predict
from tpa_convert.plans import Budget, plan_uniform

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


def as_llama(architecture: Architecture, model: Any) -> LlamaForCausalLM:
    """A Llama built from nothing but what the architecture tells."""
    settings = architecture.llama_config(model.config)
    state = architecture.llama_state_dict(model)
    if settings.pop("attention_output_bias") != settings["attention_bias"]:
        # Llama has one switch for all four biases; a zero is the same as none.
        for layer in range(settings["num_hidden_layers"]):
            name = f"model.layers.{layer}.self_attn.o_proj.bias"
            assert name not in state
            state[name] = torch.zeros(settings["hidden_size"])
    llama = LlamaForCausalLM(LlamaConfig(**settings))
    llama.load_state_dict(state, strict=True)
    return llama.eval()


@pytest.mark.parametrize("shape", HEAD_SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_view_has_the_same_logits(family: str, shape: str) -> None:
    heads, kv_heads = HEAD_SHAPES[shape]
    config = FAMILIES[family](num_attention_heads=heads, num_key_value_heads=kv_heads)
    model = random_model(config)
    architecture = architecture_of(config)
    # Past 16 positions, where the scaled rotary embeddings differ from the plain one.
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
        found = as_llama(architecture, model)(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert architecture.attention_scale(config) == model.model.layers[0].self_attn.scaling


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_shares_memory(family: str) -> None:
    model = random_model(FAMILIES[family](num_attention_heads=4, num_key_value_heads=2))
    state = architecture_of(model.config).llama_state_dict(model)
    owners = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert {tensor.untyped_storage().data_ptr() for tensor in state.values()} == owners


def test_llama_config_is_a_copy() -> None:
    config = FAMILIES["llama3-rope"](num_attention_heads=4, num_key_value_heads=2)
    architecture_of(config).llama_config(config)["rope_parameters"]["factor"] = 99.0
    assert config.rope_parameters["factor"] == 4.0


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_bytes_are_those_of_a_live_cache(family: str) -> None:
    config = FAMILIES[family](num_attention_heads=4, num_key_value_heads=2)
    model, tokens = random_model(config), torch.arange(3, 13)[None]
    prediction = predict(config, ConvertOptions(kv_ratio=0.5))
    converted = convert_tiny(model, kv_ratio=0.5)
    for predicted, one in (
        (prediction.source_kv_bytes, model),
        (prediction.kv_bytes, converted),
    ):
        layers = one(tokens, use_cache=True).past_key_values.layers
        measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert predicted == measured / tokens.shape[1]
    assert prediction.source_parameters == model.num_parameters()
    assert prediction.parameters == converted.num_parameters()
    with pytest.raises(
        UserError, match="`rank_q` is at most the number of query heads, 4: give less"
    ):
        predict(config, ConvertOptions(kv_ratio=0.5, form="linear", rank_q=5))


@pytest.mark.parametrize("family", ["llama3-rope", "phi3-longrope"])
@pytest.mark.parametrize("key_cache", ["rotated", "latent"])
def test_generation_beyond_the_length_of_training(family: str, key_cache: str) -> None:
    """Past 16 positions longrope has other factors, and what was cached is of no use."""
    model = random_model(FAMILIES[family](num_attention_heads=4, num_key_value_heads=2))
    width = 2 * model.config.hidden_size // 4
    converted = convert_tiny(model, width_k=width, width_v=width, key_cache=key_cache)
    tokens = torch.arange(3, 13)[None]
    for one in (model, converted):
        one.generation_config.eos_token_id = None
    expected = telling(model, tokens, 40)
    assert torch.equal(generated(converted, tokens, 40), expected)
    assert torch.equal(generated(converted, tokens, 40, use_cache=False), expected)


def test_widths_that_tucker_cannot_make() -> None:
    config = FAMILIES["llama"](num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(UserError, match="cannot make 11 value features of up to 2 heads with"):
        predict(config, ConvertOptions(width_k=8, width_v=11, method="tucker"))


def test_nothing_of_a_source_is_left_out_in_silence() -> None:
    model = random_model(FAMILIES["qwen2"](num_attention_heads=4, num_key_value_heads=2))
    source = replace(source_of(model), architecture=Architecture("qwen2"))  # says nothing of biases
    plan = plan_uniform(source.architecture.llama_config(model.config), Budget(kv_ratio=0.5))
    with pytest.raises(UserError, match=r"^6 tensors .* \(the first: .*self_attn.q_proj.bias\)"):
        convert_model(source, plan, None, whiten=False)


def test_fused_rows_that_do_not_fit_are_refused() -> None:
    model = random_model(FAMILIES["phi3"](num_attention_heads=4, num_key_value_heads=2))
    model.model.layers[1].self_attn.qkv_proj.weight = torch.nn.Parameter(torch.zeros(60, 32))
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.qkv_proj\.weight has 60 rows"):
        architecture_of(model.config).llama_state_dict(model)


REFUSED = {
    "no rotary": (GPT2Config(), "no rotary position embedding"),
    "alibi": (FalconConfig(alibi=True), "falcon"),
    "MLA": (DeepseekV3Config(), "MLA"),
    "encoder-decoder": (T5Config(), "encoder-decoder"),
    "MoE": (MixtralConfig(), "mixture-of-experts"),
    "qwen3": (Qwen3Config(), "QK-norm"),
    "gemma3": (Gemma3TextConfig(), "QK-norm"),
    "olmo2": (Olmo2Config(), "QK-norm"),
    "partial rotary": (GPTNeoXConfig(), "partial RoPE"),
    "partial phi3": (
        Phi3Config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.75}),
        "partial RoPE",
    ),
    "multimodal": (LlavaConfig(), "multimodal"),
    "sliding mistral": (MistralConfig(sliding_window=4096), "sliding window of 4096 tokens"),
    "sliding qwen2": (
        Qwen2Config(use_sliding_window=True, sliding_window=128, max_window_layers=4),
        "sliding window of 128 tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(UserError) as raised:
        architecture_of(config)
    message = str(raised.value)
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(use_sliding_window=False, sliding_window=128),
        Qwen2Config(use_sliding_window=True, sliding_window=128, max_window_layers=32),
        Phi3Config(sliding_window=262_144, max_position_embeddings=131_072),
        MistralConfig(sliding_window=None),
    ],
)
def test_windows_that_never_act_are_accepted(config: PreTrainedConfig) -> None:
    assert architecture_of(config).model_type == config.model_type


def test_tpa_is_refused_and_unknown_types_can_be_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tpa_convert.families.family._REGISTRY", {})

    class OtherConfig(LlamaConfig):
        model_type = "other"

    with pytest.raises(UserError, match=r"'other' is unknown .*register_architecture"):
        architecture_of(OtherConfig())
    register_architecture(Architecture(model_type="other"))
    assert architecture_of(OtherConfig()).model_type == "other"

    class TPAConfig(LlamaConfig):
        model_type = "tpa"

    with pytest.raises(UserError, match="TPA model already"):
        architecture_of(TPAConfig())
