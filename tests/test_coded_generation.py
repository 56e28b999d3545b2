"""Ways to generate with a cache coded in bits: each equals recomputing everything."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tests.conversions import convert_coded, random_blocks
from tests.generated import generated, make_caches_forget, telling
from tests.test_generation import MODES, PADDINGS, SPEAKING, WAYS, padded_prompt
from tpa_convert.modeling.tpa_attention import TPAAttention

NEW = 10


@pytest.fixture(scope="module", params=[1, 2], ids=["one block", "two blocks"])
def coded(request: pytest.FixtureRequest, tiny_llama) -> PreTrainedModel:
    """In fp64, where no rounding decides between two codes."""
    model = convert_coded(tiny_llama("gqa", **SPEAKING), key_blocks=request.param)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.double()


def prompt(batch: int = 2, length: int = 9) -> torch.Tensor:
    return random_blocks(count=batch, length=length, seed=5)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("padding", PADDINGS)
def test_generation_equals_the_uncached_result(coded, mode, padding) -> None:
    way, settings = MODES[mode]
    tokens, mask = padded_prompt(padding)
    expected = telling(coded, tokens, NEW, attention_mask=mask, **WAYS[way], use_cache=False)
    found = generated(coded, tokens, NEW, attention_mask=mask, **WAYS[way], **settings)
    assert torch.equal(found, expected)


def test_a_cache_that_loses_its_values_would_be_seen(coded, monkeypatch) -> None:
    expected = telling(coded, prompt(), NEW, use_cache=False)
    make_caches_forget(monkeypatch)
    assert (generated(coded, prompt(), NEW) != expected).any(1).all()


def test_assisted_and_prompt_lookup(coded, tiny_llama) -> None:
    tokens = prompt(batch=1)
    expected = telling(coded, tokens, NEW, use_cache=False)
    assistant = tiny_llama("gqa", **SPEAKING)
    assistant.generation_config.eos_token_id = None
    for assistance in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(generated(coded, tokens, NEW, **assistance), expected)


def test_a_coded_model_assists_its_source(coded, tiny_llama) -> None:
    source = tiny_llama("gqa", **SPEAKING).double()
    source.generation_config.eos_token_id = None
    tokens = prompt(batch=1)
    expected = telling(source, tokens, NEW)
    assert torch.equal(generated(source, tokens, NEW, assistant_model=coded), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(coded, implementation) -> None:
    model = copy.deepcopy(coded)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(prompt()).logits, coded(prompt()).logits, atol=1e-5, rtol=1e-5)
    expected = telling(coded, prompt(), NEW, use_cache=False)
    assert torch.equal(generated(model, prompt(), NEW), expected)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="refused before transformers 5.20"
)
@pytest.mark.parametrize("lengths", [[9], [9, 5, 12]], ids=["one request", "three requests"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continuous_batching_gives_what_generate_gives(coded, lengths, dtype) -> None:
    model = copy.deepcopy(coded).to(dtype)
    prompts = [random_blocks(count=1, length=length, seed=length) for length in lengths]
    # Bytes have to survive in the paged cache's numbers; what follows may part in bf16.
    count = NEW if dtype == torch.float32 else 1
    expected = [generated(model, one, NEW)[0].tolist() for one in prompts]
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    outputs = model.generate_batch(
        inputs=[one[0].tolist() for one in prompts],
        generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64),
        progress_bar=False,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    found = [output.generated_tokens for output in outputs.values()]
    assert [tokens[:count] for tokens in found] == [tokens[:count] for tokens in expected]
    assert all(len(tokens) == NEW for tokens in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_static_cache_that_is_made_for_the_heads_of_the_config(coded, dtype) -> None:
    """Its numbers are of the model's type and hold bytes exactly."""
    model, tokens = copy.deepcopy(coded).to(dtype), prompt(batch=1, length=16)
    config = model.config
    made, free = (StaticCache(config=config, max_cache_len=20) for _ in range(2))
    made.early_initialization(
        1, config.num_key_value_heads, config.head_dim, dtype, torch.device("cpu")
    )
    for start, end in [(0, 7), (7, 8), (8, 16)]:
        positions = torch.arange(start, end)[None]
        with torch.no_grad():
            one, other = (
                model(tokens[:, start:end], past_key_values=cache, position_ids=positions).logits
                for cache in (made, free)
            )
        assert torch.equal(one, other)
    assert made.layers[0].keys.dtype == dtype
    assert free.layers[0].keys.dtype == torch.uint8


def test_static_cache_compiles_as_one_graph(coded) -> None:
    tokens = prompt(length=6)
    expected = coded(tokens, use_cache=False).logits
    cache = StaticCache(config=coded.config, max_cache_len=16)
    coded(tokens[:, :4], past_key_values=cache)
    step = torch.compile(coded, fullgraph=True, backend="eager")
    for t in (4, 5):
        positions = torch.tensor([[t]])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Dynamo")
            new = tokens[:, t : t + 1]
            logits = step(new, past_key_values=cache, position_ids=positions).logits
        torch.testing.assert_close(logits[:, 0], expected[:, t], atol=1e-4, rtol=0)


def test_continuing_a_conversation_equals_starting_over(coded) -> None:
    """A cache that grew by chunks of odd lengths, and lost three tokens in between."""
    tokens = prompt(batch=1, length=17)
    cache = coded(tokens[:, :7], use_cache=True).past_key_values
    coded(tokens[:, :3], past_key_values=cache)
    cache.crop(-3)
    steps: list[Any] = []
    for start, end in [(7, 8), (8, 11), (11, 17)]:
        steps.append(coded(tokens[:, start:end], past_key_values=cache).logits)
    expected = coded(tokens, use_cache=False).logits[:, 7:]
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=0)
    other = coded(tokens.roll(1, 1), use_cache=False).logits[:, 7:]
    assert (other - expected).abs().max() > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_cache_offload(coded, implementation) -> None:
    model = copy.deepcopy(coded).cuda()
    tokens = prompt().cuda()
    expected = telling(model, tokens, NEW, use_cache=False)
    out = generated(model, tokens, NEW, cache_implementation=implementation, disable_compile=True)
    assert torch.equal(out, expected)


def test_the_first_prompt_of_a_static_cache_is_not_read_back(coded, monkeypatch) -> None:
    """Neither its rows nor the free slots behind them; a second prompt has to."""
    unpacked: list[int] = []
    real = TPAAttention.unpack

    def unpack(self: Any, key: torch.Tensor, *rest: Any) -> Any:
        unpacked.append(key.shape[2])
        return real(self, key, *rest)

    monkeypatch.setattr(TPAAttention, "unpack", unpack)
    tokens, cache = prompt(), StaticCache(config=coded.config, max_cache_len=16)
    with torch.no_grad():
        expected = coded(tokens, use_cache=False).logits
        first = coded(tokens[:, :5], past_key_values=cache).logits
        assert not unpacked
        second = coded(tokens[:, 5:], past_key_values=cache).logits
    assert set(unpacked) == {16}
    assert torch.allclose(torch.cat((first, second), 1), expected, atol=1e-9)
