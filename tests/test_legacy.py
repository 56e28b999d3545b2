"""Checkpoints that version 0.1 wrote (`model_type: tpa`) give the logits that it gave.

`legacy/` holds tiny random models and their logits, as version 0.1 saved them with transformers
5.23; models from a Qwen2 have biases that a Llama's do not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tpa_convert.modeling import TPAAttention

DIRECTORY = Path(__file__).with_name("legacy")
NAMES = sorted(path.name for path in DIRECTORY.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_version_that_wrote_it(name) -> None:
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY / name)
    expected = load_file(DIRECTORY / name / "expected.safetensors")
    found = model(expected["ids"]).logits
    torch.testing.assert_close(found, expected["logits"], atol=1e-5, rtol=0)
    assert not model.training
    assert sum(isinstance(module, TPAAttention) for module in model.modules()) == 2


@pytest.mark.parametrize("name", ["llama-applied", "llama-absorbed"])
def test_the_rotary_pairs_among_the_weights_matter(name, tmp_path) -> None:
    directory = tmp_path / name
    shutil.copytree(DIRECTORY / name, directory)
    state = load_file(directory / "model.safetensors")
    for key in state:
        if key.endswith("rotary_pair"):
            state[key] = (state[key] + 1).clamp(max=3)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    expected = load_file(directory / "expected.safetensors")
    found = AutoModelForCausalLM.from_pretrained(directory)(expected["ids"]).logits
    assert (found - expected["logits"]).abs().max() > 1e-2


def test_what_is_saved_again_is_a_model_of_today(tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY / "llama-latent")
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "tpa_llama"
    tokens = load_file(DIRECTORY / "llama-latent" / "expected.safetensors")["ids"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_components_in_an_unknown_order_are_refused(tmp_path) -> None:
    directory = tmp_path / "mixed"
    shutil.copytree(DIRECTORY / "llama-applied", directory)
    state = load_file(directory / "model.safetensors")
    for key in state:
        if key.endswith("rotary_pair"):
            state[key] = state[key].flip(0).contiguous()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layer 0 has its key components in an unknown order"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_the_config_alone_is_read() -> None:
    config = AutoConfig.from_pretrained(DIRECTORY / "llama-affine")
    assert (config.model_type, config.form) == ("tpa", ["affine", "affine"])
