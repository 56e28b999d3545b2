"""Serving paths of transformers whose caches are made for the heads of a config."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from tests.conftest import make_tiny_llama
from tests.conversions import convert_coded, convert_tiny, random_blocks
from tests.generated import telling
from tests.test_generation import LAYOUTS, SPEAKING
from tpa_convert.modeling.tpa_cache import fold, unfold
from tpa_convert.modeling.tpa_configuration import check_transformers

NEW = 10


@pytest.fixture(
    scope="module",
    params=["static absorbed", "static applied", "latent absorbed", "affine applied"],
)
def model(request: pytest.FixtureRequest, tiny_llama) -> PreTrainedModel:
    converted = convert_tiny(tiny_llama("gqa", **SPEAKING), **LAYOUTS[request.param])
    converted.generation_config.eos_token_id = None
    converted.generation_config.pad_token_id = 0
    return converted


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="refused before transformers 5.20"
)
@pytest.mark.parametrize("lengths", [[9], [9, 5, 12]], ids=["one request", "three requests"])
def test_continuous_batching_gives_what_generate_gives(model, lengths) -> None:
    prompts = [random_blocks(count=1, length=length, seed=length) for length in lengths]
    expected = [telling(model, prompt, NEW)[0].tolist() for prompt in prompts]
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    outputs = model.generate_batch(
        inputs=[prompt[0].tolist() for prompt in prompts],
        generation_config=settings,
        # By default it takes most of the memory that is free.
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64),
        progress_bar=False,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    assert [output.generated_tokens for output in outputs.values()] == expected


def test_a_static_cache_that_is_made_for_the_heads_of_the_config(model) -> None:
    """As `TorchExportableModuleForDecoderOnlyLM` makes it, before the model sees it."""
    tokens = random_blocks(count=1, length=20, seed=5)
    expected = model(tokens, use_cache=False).logits
    config = model.config
    cache = StaticCache(config=config, max_cache_len=24)
    cache.early_initialization(
        1, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu")
    )
    steps: list[Any] = []
    with torch.no_grad():
        for start, end in [(0, 9), *((t, t + 1) for t in range(9, 20))]:
            positions = torch.arange(start, end)[None]
            steps.append(
                model(tokens[:, start:end], past_key_values=cache, position_ids=positions).logits
            )
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-5, rtol=1e-5)
    assert cache.layers[0].keys.shape[1:] == (config.num_key_value_heads, 24, config.head_dim)


@pytest.mark.parametrize("key_cache", ["rotated", "latent"])
def test_a_cache_made_for_one_head_that_is_as_wide_as_the_keys(tiny_llama, key_cache) -> None:
    model = convert_tiny(tiny_llama("mqa"), width_k=8, width_v=4, key_cache=key_cache)
    tokens = random_blocks(count=1, length=12, seed=5)
    cache = StaticCache(config=model.config, max_cache_len=16)
    cache.early_initialization(1, 1, 8, torch.float32, torch.device("cpu"))
    positions = torch.arange(12)[None]
    found = model(tokens, past_key_values=cache, position_ids=positions).logits
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_exported_program_with_a_static_cache(model) -> None:
    """transformers' recipe for `torch.export`, token by token."""
    tokens = random_blocks(count=1, length=8, seed=3)
    expected = model(tokens, use_cache=False).logits
    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        max_length=16,
        cache_config={"batch_size": 1, "max_cache_len": 16},
    )
    recipe = TorchExportableModuleForDecoderOnlyLM(
        model, batch_size=1, max_cache_len=16, device=torch.device("cpu")
    )
    at = torch.tensor([0])
    program = recipe.export(input_ids=tokens[:, :1], cache_position=at).module()
    steps = [program(input_ids=tokens[:, t : t + 1], cache_position=at + t) for t in range(8)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-5, rtol=1e-5)


def test_rows_are_folded_and_unfolded() -> None:
    row = torch.randn(2, 1, 5, 7)
    folded = fold(row, (3, 4))
    assert folded.shape == (2, 3, 5, 4)
    assert torch.equal(unfold(folded, 7), row)
    assert not torch.equal(unfold(folded.flip(1), 7), row)
    with pytest.raises(ValueError, match="7 numbers a token do not fit into a cache of 3 heads of"):
        fold(row, (3, 2))


@pytest.mark.parametrize("version", ["5.17.0", "5.24.0.dev0", "5.99"])
def test_versions_that_run(version) -> None:
    check_transformers(version)


@pytest.mark.parametrize("version", ["4.57.1", "5.16.1", "6.0.0"])
def test_versions_that_do_not_run_are_told_in_a_line(version) -> None:
    with pytest.raises(ImportError, match=rf"transformers >= 5\.17 and < 6, and {version} is"):
        check_transformers(version)


def test_rows_wider_than_a_cache_made_for_heads_are_refused() -> None:
    """Of 8 bits a component rows have a byte more than the source has numbers, their header."""
    source = make_tiny_llama()
    tokens = random_blocks(count=1, length=4)
    for bits, ratio, fits in ((8, 0.75, False), (None, 0.4, True)):
        model = convert_coded(source, bits=bits, kv_ratio=ratio)
        cache = StaticCache(config=model.config, max_cache_len=8)
        cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
        layouts = [(s.key_layout, s.value_layout) for s in model.config.layer_shapes]
        widths = [layout.row_bytes for pair in layouts for layout in pair]
        assert (max(widths) <= 2 * 8) is fits
        if fits:
            model(tokens, past_key_values=cache)
            continue
        with pytest.raises(ValueError, match="do not fit into a cache of 2 heads of 8"):
            model(tokens, past_key_values=cache)
