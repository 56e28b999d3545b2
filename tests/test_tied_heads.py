"""Whether a head is the embedding is seen in the loaded weights, whatever the config says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.command_line import tpa_convert
from tests.conftest import make_tiny_tokenizer
from tests.tiny_models import MODELS, random_model


def saved(directory: Path, family: str, own_head: bool) -> None:
    """A checkpoint whose config says that the head is tied, with or without a head of its own."""
    model = MODELS[family]()
    config = type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": True})
    random_model(type(model), config).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in state
    if own_head:
        generator = torch.Generator().manual_seed(0)
        head = torch.randn(state["model.embed_tokens.weight"].shape, generator=generator)
        state["lm_head.weight"] = 0.3 * head
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("own_head", [True, False])
def test_a_head_of_its_own_is_kept(tmp_path, family, own_head) -> None:
    saved(tmp_path / "source", family, own_head)
    options = ["--width-k", 16, "--width-v", 16, "--calibration-blocks", 4, "--block-length", 32]
    result = tpa_convert("convert", tmp_path / "source", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert converted.config.tie_word_embeddings is not own_head
    assert torch.equal(converted.lm_head.weight, source.lm_head.weight)
    tokens = torch.arange(3, 43)[None]
    torch.testing.assert_close(converted(tokens).logits, source(tokens).logits, atol=1e-4, rtol=0)
    tied = torch.equal(converted.lm_head.weight, converted.model.embed_tokens.weight)
    assert tied is not own_head
