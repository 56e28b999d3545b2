"""Converted models as stock Llamas and as models of their source's class: the same function."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.conversions import (
    convert_tiny,
    random_blocks,
    random_coded,
    source_of,
    tiny_moments,
)
from tests.generated import telling
from tests.test_generation import SPEAKING
from tests.tiny_models import MODELS, SIZES, random_model
from tpa_convert.conversion.model import convert_model
from tpa_convert.conversion.shared_pairs import share_pairs
from tpa_convert.errors import UserError
from tpa_convert.export.dense import to_dense
from tpa_convert.export.llama import shared_slots, to_llama
from tpa_convert.export.stock import attention_layers, check_same_logits, save_stock, source_class
from tpa_convert.plans import Budget, plan_uniform

TOLERANCE = 1e-3
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def plain_mistral() -> Any:
    return random_model(MistralForCausalLM, MistralConfig(**SIZES, head_dim=8, sliding_window=None))


def partial_phi3() -> Any:
    """Of whose heads half is rotated."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return random_model(Phi3ForCausalLM, Phi3Config(**SIZES, rope_parameters=rope))


LLAMAS = {
    "llama": MODELS["llama"],
    "biases": lambda: make_tiny_llama(attention_bias=True, mlp_bias=True),
    "yarn": lambda: make_tiny_llama(rope_parameters=YARN),
    "tied": lambda: make_tiny_llama(tie_word_embeddings=True),
    "mistral": plain_mistral,
    "qwen2": MODELS["qwen2"],
    "phi3, half rotated": partial_phi3,
}


def logits(model: PreTrainedModel, length: int = 40) -> torch.Tensor:
    return model(random_blocks(count=2, length=length, seed=7), use_cache=False).logits


def assert_same(model: PreTrainedModel, exported: PreTrainedModel) -> None:
    torch.testing.assert_close(logits(exported), logits(model), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------- Llama


@pytest.mark.parametrize("gauge", ["absorbed", "applied"])
@pytest.mark.parametrize("name", list(LLAMAS))
def test_a_llama_computes_the_same(name, gauge) -> None:
    model = convert_tiny(LLAMAS[name](), kv_floats=22, gauge=gauge)
    exported = to_llama(model)
    assert type(exported) is LlamaForCausalLM
    assert exported.config.num_key_value_heads == 1
    assert_same(model, exported)


@pytest.mark.parametrize("name", ["llama-absorbed", "llama-applied"])
def test_checkpoints_of_version_0_1(name) -> None:
    directory = Path(__file__).parent / "legacy" / name
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert_same(model, to_llama(model))


def test_its_table_of_frequencies_is_what_makes_it_the_same(tiny_llama) -> None:
    model = convert_tiny(tiny_llama("gqa"), kv_floats=22)
    exported = to_llama(model)
    exported.model.rotary_emb.original_inv_freq.fill_(0.1)
    assert (logits(exported) - logits(model)).abs().max() > 0.1
    with pytest.raises(UserError, match="a LlamaForCausalLM cannot hold what this model computes"):
        check_same_logits(model, exported)


def test_layers_share_one_table(tiny_llama) -> None:
    """A pair has as many slots as the layer that has most components on it."""
    model = convert_tiny(tiny_llama("gqa", num_hidden_layers=4), kv_floats=14)
    layers = attention_layers(model)
    slots = shared_slots(layers)
    tables = []
    for layer, places in zip(layers, slots.layers, strict=True):
        assert len(set(places.tolist())) == len(places)
        on_pairs = [slots.pairs[place] for place in places.tolist()]
        assert on_pairs == layer.keys.rotary_pair.tolist()
        tables.append(tuple(on_pairs))
    assert len(set(tables)) > 1, "these layers would share a table by themselves"
    assert 2 * len(slots.pairs) > max(layer.shape.width_k for layer in layers)
    assert slots.head_dim % 8 == 0


def with_shared_pairs(source: PreTrainedModel, **budget: Any) -> PreTrainedModel:
    sizes = source_of(source).family.attention_sizes(source.config)
    plan = plan_uniform(sizes, Budget(**budget), form="static", gauge="applied")
    moments = tiny_moments(source)
    return convert_model(source_of(source), share_pairs(plan, moments), moments)


def test_a_shared_table_costs_no_room() -> None:
    source = make_tiny_llama("gqa", num_hidden_layers=4)
    model = with_shared_pairs(source, width_k=8, width_v=8)
    tables = {tuple(layer.keys.rotary_pair.tolist()) for layer in attention_layers(model)}
    assert len(tables) == 1
    exported = to_llama(model)
    assert exported.config.head_dim == 8
    assert_same(model, exported)
    apart = convert_tiny(source, width_k=8, width_v=8, gauge="applied")
    assert to_llama(apart).config.head_dim > 8
    assert (logits(apart) - logits(model)).abs().max() > 1e-3


def test_narrower_layers_take_fewer_of_the_same_pairs() -> None:
    source = make_tiny_llama("gqa", num_hidden_layers=3)
    sizes = source_of(source).family.attention_sizes(source.config)
    plan = plan_uniform(sizes, Budget(width_k=12, width_v=8), form="static", gauge="applied")
    layers = [replace(plan.layers[0], width_k=width) for width in (6, 12, 10)]
    moments = tiny_moments(source)
    shared = share_pairs(replace(plan, layers=layers), moments)
    model = convert_model(source_of(source), shared, moments)
    assert 2 * len(shared_slots(attention_layers(model)).pairs) == 12
    assert_same(model, to_llama(model))


def test_the_config_scales_no_attention(tiny_llama) -> None:
    """Engines do where a context is longer than the original one."""
    exported = to_llama(convert_tiny(tiny_llama("gqa", rope_parameters=YARN), kv_floats=22))
    rope = exported.config.rope_parameters
    assert rope["attention_factor"] == rope["factor"] == 1.0
    assert rope["original_max_position_embeddings"] == exported.config.max_position_embeddings
    assert exported.model.rotary_emb.attention_scaling == 1.0


CHANGING = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("source", "conversion", "reason"),
    [
        ("llama", {"key_cache": "latent"}, "convert with --key-cache rotated"),
        ("llama", {"form": "affine", "kv_floats": 20}, "convert with --form static"),
        ("mistral", {}, "it attends in a window, .*--to dense"),
        ("qwen3", {}, "a Qwen3ForCausalLM is no Llama inside: .*--to dense"),
        ("gemma3", {}, "--to dense"),
        ("dynamic", {}, r"change with the length \(dynamic\)"),
    ],
)
def test_what_a_llama_cannot_hold_is_refused_with_what_helps(source, conversion, reason) -> None:
    made = make_tiny_llama(rope_parameters=CHANGING) if source == "dynamic" else MODELS[source]()
    model = convert_tiny(made, **conversion)
    with pytest.raises(UserError, match=reason) as refused:
        to_llama(model)
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------- dense

WITHOUT_BIASES = {
    *("cwm", "ernie4_5_moe", "exaone4", "minimax_m2"),
    *("ministral", "ministral3", "mistral", "mixtral", "phi3"),
}


@pytest.mark.parametrize("make", [to_llama, to_dense])
def test_caches_of_codes_are_refused(make) -> None:
    with pytest.raises(UserError, match="codes of bits; convert with --cache-bits 16"):
        make(random_coded())


@pytest.mark.parametrize("key_cache", ["rotated", "latent"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_dense_model_computes_the_same(name, key_cache) -> None:
    source = MODELS[name]()
    gauge = {"gauge": "applied"}
    model = convert_tiny(source, kv_floats=22, key_cache=key_cache, **gauge)
    for layer in attention_layers(model):  # a constant part needs a bias, which not all have
        if key_cache == "latent" and name in WITHOUT_BIASES:
            layer.keys.gauge.offset.data.zero_()
    exported = to_dense(model)
    assert type(exported) is type(source) is source_class(model)
    assert_same(model, exported)
    assert (logits(exported) - logits(source)).abs().max() > 1e-2, "the conversion lost nothing"


@pytest.mark.parametrize("name", ["biases", "yarn", "tied", "phi3, half rotated"])
def test_a_dense_model_of_every_kind_of_projection(name) -> None:
    model = convert_tiny(LLAMAS[name](), kv_floats=22, gauge="applied")
    assert_same(model, to_dense(model))


def test_absorbed_values_as_narrow_as_a_head_are_repeated(tiny_llama) -> None:
    model = convert_tiny(tiny_llama("gqa"), width_k=10, width_v=6, key_cache="latent")
    assert attention_layers(model)[0].shape.value_gauge == "absorbed"
    assert_same(model, to_dense(model))


@pytest.mark.parametrize(
    ("source", "conversion", "reason"),
    [
        ("llama", {"kv_floats": 14, "gauge": "absorbed"}, "convert with --gauge applied"),
        ("llama", {"form": "affine", "kv_floats": 20}, "convert with --form static"),
        (
            "llama",
            {"width_k": 8, "width_v": 12, "gauge": "absorbed", "key_cache": "latent"},
            "reads wider values; convert with --gauge applied",
        ),
        ("mistral", {"key_cache": "latent"}, "no biases; convert with --key-cache rotated"),
    ],
)
def test_what_the_source_class_cannot_hold_is_refused(source, conversion, reason) -> None:
    model = convert_tiny(MODELS[source](), **conversion)
    with pytest.raises(UserError, match=reason):
        to_dense(model)


# ------------------------------------------------------------------------------- on disk

SCRIPT = """
import sys
sys.modules["tpa_convert"] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoModelForCausalLM
directory, tokens, outputs, new_tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory)
tokens = torch.load(tokens)
with torch.no_grad():
    torch.save(
        {
            "class": type(model).__name__,
            "logits": model(tokens).logits,
            "text": model.generate(tokens, max_new_tokens=int(new_tokens), do_sample=False),
        },
        outputs,
    )
"""
NEW = 24


@pytest.mark.parametrize(("form", "make"), [("llama", to_llama), ("dense", to_dense)])
def test_a_fresh_process_without_this_package(tmp_path: Path, form, make) -> None:
    model = convert_tiny(make_tiny_llama("gqa", **SPEAKING), kv_floats=14, gauge="applied")
    model.generation_config.eos_token_id = None
    save_stock(make(model), make_tiny_tokenizer(), tmp_path / form, "tiny", form, 28, None)
    tokens = random_blocks(count=1, length=9, seed=5)
    torch.save(tokens, tmp_path / "tokens.pt")
    outputs = tmp_path / "outputs.pt"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / form, tmp_path / "tokens.pt", outputs, str(NEW)],
        check=True,
    )
    found = torch.load(outputs)
    assert found["class"] == "LlamaForCausalLM"
    assert (found["logits"] - model(tokens).logits).abs().max() <= TOLERANCE
    assert torch.equal(found["text"][:, 9:], telling(model, tokens, NEW))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / form)
    assert_same(model, reloaded)
