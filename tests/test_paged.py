"""Continuous batching with packed rows: the text of `generate`, and the bytes of the live cache."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tests.conftest import make_tiny_llama
from tests.conversions import convert_tiny, random_blocks, random_coded
from tests.generated import generated, telling
from tests.test_generation import LAYOUTS, SPEAKING
from tests.tiny_models import MODELS
from tpa_convert.modeling import tpa_paged
from tpa_convert.modeling.tpa_paged import ROWS, measured_rows, offsets

if Version(transformers.__version__) < Version("5.20"):
    pytest.skip("refused before transformers 5.20", allow_module_level=True)

from transformers.generation.continuous_batching import cache as paged

NEW = 10
LENGTHS = [9, 5, 12, 21]


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The paged caches that are made in a test."""
    made: list[Any] = []
    initialise = paged.PagedAttentionCache.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(paged.PagedAttentionCache, "__init__", noted)
    return made


def speaking(model: PreTrainedModel) -> PreTrainedModel:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def batched(model: PreTrainedModel, prompts: list[torch.Tensor]) -> list[list[int]]:
    outputs = model.generate_batch(
        inputs=[prompt[0].tolist() for prompt in prompts],
        generation_config=GenerationConfig(
            max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        # Small pages, so that requests have several; by default it takes most of the memory.
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=32, page_size=4, max_batch_tokens=16
        ),
        progress_bar=False,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs.values()]


def expected(model: PreTrainedModel, prompts: list[torch.Tensor]) -> list[list[int]]:
    return [telling(model, prompt, NEW)[0].tolist() for prompt in prompts]


def prompts() -> list[torch.Tensor]:
    return [random_blocks(count=1, length=length, seed=length) for length in LENGTHS]


def overlapping(rows: Any) -> Any:
    """Offsets that have rows overwrite each other."""
    return dict.fromkeys(rows, (0, 4)), offsets(rows)[1]


def live_bytes(model: PreTrainedModel) -> float:
    """Bytes a token in transformers' dynamic cache."""
    cache = model(random_blocks(count=1, length=6), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 6


@pytest.mark.parametrize(
    "layout", ["static absorbed", "static applied", "latent absorbed", "affine applied", "paper"]
)
def test_rows_are_packed_and_text_is_the_same(caches, layout) -> None:
    source = make_tiny_llama("gqa", **SPEAKING)
    model = speaking(convert_tiny(source, **LAYOUTS[layout]))
    assert batched(model, prompts()) == expected(model, prompts())
    (cache,) = caches
    allocator = cache.cache_allocators["full_attention"]
    assert allocator.bytes_per_token == live_bytes(model)
    assert allocator.bytes_per_block == 4 * live_bytes(model)
    assert cache.cache_tensor.numel() == (cache.num_sectors + 2) * cache.bytes_per_sector
    # As many bytes as 32 blocks of the source, hence room for more tokens.
    held = allocator.num_blocks * 4
    assert held * live_bytes(model) >= 32 * 4 * live_bytes(source)
    assert (held > 32 * 4) == (live_bytes(model) < live_bytes(source))


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "mistral"])
@pytest.mark.parametrize("key_cache", ["rotated", "latent"])
def test_windows_and_normalised_keys(caches, monkeypatch, name, key_cache) -> None:
    model = speaking(convert_tiny(MODELS[name](3), kv_floats=14, key_cache=key_cache))
    alone = [generated(model, prompt, NEW)[0].tolist() for prompt in prompts()]
    assert batched(model, prompts()) == alone
    (cache,) = caches
    found = sum(allocator.bytes_per_token for allocator in cache.cache_allocators.values())
    assert found == live_bytes(model)
    monkeypatch.setattr(tpa_paged, "offsets", overlapping)
    assert batched(model, prompts()) != alone, "this text does not tell a broken cache"


def test_coded_rows_are_packed_as_they_are(caches) -> None:
    model = speaking(random_coded())
    assert batched(model, prompts()) == expected(model, prompts())
    (cache,) = caches
    allocator = cache.cache_allocators["full_attention"]
    shape = model.config.layer_shape(0)
    assert allocator.bytes_per_token == 2 * shape.cached_bytes(2) == live_bytes(model)
    assert {dtype for row in measured_rows(model) for _, dtype in row} == {torch.uint8}


def test_rows_that_lie_over_each_other_are_noticed(monkeypatch) -> None:
    """The comparison above can fail."""
    model = speaking(convert_tiny(make_tiny_llama("gqa", **SPEAKING), kv_floats=14))
    monkeypatch.setattr(tpa_paged, "offsets", overlapping)
    assert batched(model, prompts()) != expected(model, prompts())


def test_other_models_keep_their_own_allocator(caches) -> None:
    source = speaking(make_tiny_llama("gqa", **SPEAKING))
    converted = speaking(convert_tiny(make_tiny_llama("gqa", **SPEAKING), kv_floats=14))
    batched(converted, prompts())
    assert batched(source, prompts()) == expected(source, prompts())
    kinds = [type(cache.cache_allocators["full_attention"]).__name__ for cache in caches]
    assert kinds == ["Packed", "FullAttentionCacheAllocator"]


def test_rows_are_forgotten_with_the_model() -> None:
    model = convert_tiny(make_tiny_llama("gqa"), kv_floats=14)
    tpa_paged.pack_paged_cache(model)
    known = id(model.config)
    assert ROWS[known] == measured_rows(model)
    del model
    gc.collect()
    assert known not in ROWS


BYTES = torch.uint8
FLOATS = torch.float32


def test_offsets_keep_numbers_aligned() -> None:
    rows = {3: ((5, BYTES), (6, BYTES)), 7: ((3, torch.bfloat16), (2, FLOATS))}
    assert offsets(rows) == ({3: (0, 5), 7: (12, 20)}, 28)
    assert offsets({0: ((5, BYTES), (6, BYTES))}) == ({0: (0, 5)}, 11)


def test_rows_of_any_type_and_width_are_held() -> None:
    """Bytes, an odd number of them, beside floats."""
    config = convert_tiny(make_tiny_llama("gqa"), kv_floats=14).config
    ROWS[id(config)] = [((5, BYTES), (6, BYTES)), ((4, FLOATS), (3, torch.bfloat16))]
    try:
        tpa_paged.register()
        cache = paged.PagedAttentionCache(
            config,
            ContinuousBatchingConfig(
                num_blocks=8, page_size=4, max_batch_tokens=16, max_memory_percent=0.5
            ),
            torch.device("cpu"),
            Alone(),
            torch.float32,
        )
    finally:
        del ROWS[id(config)]
    allocator = cache.cache_allocators["full_attention"]
    assert allocator.bytes_per_token == 36
    at = torch.tensor([allocator.write_trash_index + 5, allocator.write_trash_index + 9])
    written = {
        0: (torch.randint(256, (2, 1, 5), dtype=BYTES), torch.randint(256, (2, 1, 6), dtype=BYTES)),
        1: (torch.randn(2, 1, 4), torch.randn(2, 1, 3).bfloat16()),
    }
    for layer, (key, value) in written.items():
        allocator.update(key, value, layer, torch.tensor([], dtype=torch.long), at)
    for layer, rows in written.items():
        nothing = torch.tensor([], dtype=torch.long)
        empty = [row[:0] for row in rows]
        found = allocator.update(*empty, layer, at, nothing)
        for one, other in zip(found, rows, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


class Alone:
    """One process, as the paged cache asks for it."""

    tp_size = 1

    def are_kv_heads_tp_ed(self) -> bool:
        return False
