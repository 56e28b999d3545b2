"""Adapters with peft's defaults, packed sequences, quantised weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from tests.conversions import convert_coded, convert_tiny, random_blocks
from tests.generated import telling
from tests.test_generation import LAYOUTS, SPEAKING
from tests.tiny_models import MODELS

FORMS = ["static absorbed", "static applied", "latent absorbed", "affine applied", "paper"]


@pytest.fixture
def model(request: pytest.FixtureRequest, tiny_llama) -> PreTrainedModel:
    return convert_tiny(tiny_llama("gqa", **SPEAKING), **LAYOUTS[request.param])


# ------------------------------------------------------------------------------- adapters


def trained(model: Any, steps: int = 5) -> list[float]:
    tokens = random_blocks(count=4, length=24, seed=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("model", [*FORMS, "paper with factored queries"], indirect=True)
def test_lora_with_defaults(model, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    type(model)(model.config)  # a model that is made after peft is imported tells it
    before = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    touched = {name for name, p in adapted.named_parameters() if p.requires_grad}
    layers = model.config.num_hidden_layers
    assert len(touched) >= 4 * layers  # two projections a layer, two matrices each
    assert all(".self_attn." in name for name in touched)
    losses = trained(adapted)
    assert losses[-1] < losses[0]
    tokens = random_blocks(count=1, length=12, seed=2)
    expected = adapted(tokens).logits
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(before, tmp_path)
    torch.testing.assert_close(again(tokens).logits, expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "phi3"])
def test_lora_with_defaults_in_other_families(name) -> None:
    peft = pytest.importorskip("peft")
    model = convert_tiny(MODELS[name](), kv_floats=14)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    losses = trained(adapted)
    assert losses[-1] < losses[0]


def test_models_that_peft_was_not_told_of_are_refused(tiny_llama, monkeypatch) -> None:
    """What is tested above is not peft's own doing."""
    peft = pytest.importorskip("peft")
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as mapping

    model = convert_tiny(tiny_llama("gqa"), kv_floats=14)
    monkeypatch.delitem(mapping, model.config.model_type)
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))


# ------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("model", FORMS, indirect=True)
def test_packed_sequences_do_not_see_each_other(model) -> None:
    parts = [random_blocks(count=1, length=length, seed=length) for length in (7, 11, 4)]
    packed = torch.cat(parts, 1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    found = model(packed, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    running_on = model(packed, use_cache=False).logits
    assert (running_on - alone).abs().max() > 0.1


# ------------------------------------------------------------------------------- weights


def assert_runs_like(model: PreTrainedModel, quantised: PreTrainedModel) -> None:
    """Nearly the same logits, with and without a cache, and other weights."""
    tokens = random_blocks(count=1, length=16, seed=3)
    expected = model(tokens, use_cache=False).logits
    found = quantised(tokens, use_cache=False).logits
    error = (found - expected).norm() / expected.norm()
    assert 1e-6 < error < 0.1
    cache = DynamicCache(config=model.config)
    steps = [quantised(tokens[:, :9], past_key_values=cache).logits]
    steps += [quantised(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(9, 16)]
    torch.testing.assert_close(torch.cat(steps, 1), found, atol=1e-4, rtol=1e-4)
    model.generation_config.eos_token_id = None
    telling(model, tokens, 8)


@pytest.mark.parametrize("model", FORMS, indirect=True)
def test_weights_of_torchao(model) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    assert_runs_like(model, quantised)


@pytest.mark.parametrize("model", FORMS, indirect=True)
def test_weights_of_quanto(model) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quantised = copy.deepcopy(model)
    quanto.quantize(quantised, weights=quanto.qint8)
    quanto.freeze(quantised)
    assert_runs_like(model, quantised)


@pytest.mark.parametrize("form", [*FORMS, "coded"])
def test_linear_layers_are_given_features_of_their_width(form, tiny_llama) -> None:
    """What puts others in their places goes by what they say of themselves."""
    source = tiny_llama("gqa", **SPEAKING)
    model = convert_coded(source) if form == "coded" else convert_tiny(source, **LAYOUTS[form])
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda layer, given: seen.append((layer.in_features, given[0].shape[-1]))
            )
    model.generate(random_blocks(count=1, length=9, seed=3), max_new_tokens=3, do_sample=False)
    assert len(seen) >= 3 * 7 * model.config.num_hidden_layers
    assert all(declared == given for declared, given in seen)
