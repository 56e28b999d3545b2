"""Fixtures shared by all tests: tiny random models, nothing from the network."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach the Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the package does it

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# name -> (query heads, key-value heads)
HEAD_SHAPES = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def frozen_imports() -> None:
    """What is imported is never garbage. Healing collects garbage at its end, and would look
    through a million objects each time. Models are made by the thousand and are small: looking for
    garbage as often as Python does by itself takes a fourteenth of the suite."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)


def make_tiny_llama(shape: str = "gqa", *, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama in fp32 and eval mode: 2 layers, hidden 32, head dim 8, vocabulary 128.

    Args:
        shape: `mha`, `gqa` or `mqa`.
        seed: of the weights; the global random state is left alone.
        **overrides: any field of `LlamaConfig`.
    """
    heads, kv_heads = HEAD_SHAPES[shape]
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # Ten times Llama's default: with 0.02 a tiny model attends uniformly and tests see nothing.
        "initializer_range": 0.2,
        **overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        # Norm weights of one and biases of zero would hide mistakes in how they are carried over.
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """The factory itself: `tiny_llama("mha", num_hidden_layers=3)`."""
    return make_tiny_llama


@pytest.fixture(params=list(HEAD_SHAPES))
def tiny_source_model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """One tiny Llama for each of MHA, GQA and MQA."""
    return make_tiny_llama(request.param)


@pytest.fixture
def random_tokens() -> Callable[..., torch.Tensor]:
    """`random_tokens(batch, length, vocab_size=128, seed=0)` -> LongTensor [batch, length]."""

    def make(batch: int, length: int, vocab_size: int = 128, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, vocab_size, (batch, length), generator=generator)

    return make


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of printable ASCII: 99 ids, with `<pad>` 0, `<s>` 1, `</s>` 2."""
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*specials, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer whose ids fit the tiny models' vocabulary."""
    return make_tiny_tokenizer()


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_checkpoint(model=None, name="source")` -> directory with model and tokenizer saved."""

    def make(model: PreTrainedModel | None = None, name: str = "source") -> Path:
        directory = tmp_path / name
        (model or make_tiny_llama()).save_pretrained(directory)
        make_tiny_tokenizer().save_pretrained(directory)
        return directory

    return make
