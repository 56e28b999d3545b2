"""Models whose cache is coded in bits: every way to run them gives one result, at the bytes
promised.

Modes are compared in fp64: no number then lies so near the middle between two codes that another
order of sums decides.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import QuantizedLayer

from tests.conversions import coded_moments, convert_coded, random_blocks, source_of
from tests.exports import without_package
from tests.test_families import stepwise
from tests.tiny_models import MODELS, WINDOW
from tpa_convert.calibration.cache_moments import full_width
from tpa_convert.calibration.moments import Moments
from tpa_convert.evaluation import cache_bytes
from tpa_convert.forward.comparison import agreement
from tpa_convert.modeling.tpa_attention import TPAAttention
from tpa_convert.modeling.tpa_codes import unpack_rows

NAMES = ["llama", "qwen3", "gemma3", "phi3", "mistral"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=NAMES)
def source(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def moments(source) -> Moments:
    return coded_moments(source)


@pytest.fixture(scope="module", params=[1, 2], ids=["one block", "two blocks"])
def coded(request: pytest.FixtureRequest, source, moments) -> PreTrainedModel:
    """At a quarter of the bytes."""
    return convert_coded(source, moments=moments, key_blocks=request.param)


@pytest.fixture(scope="module")
def precise(coded) -> PreTrainedModel:
    return copy.deepcopy(coded).double()


def text(count: int = 2, length: int = 3 * WINDOW, seed: int = 5) -> Tensor:
    return random_blocks(count=count, length=length, seed=seed)


def logits(model: PreTrainedModel, tokens: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def attentions(model: PreTrainedModel) -> list[TPAAttention]:
    return [module for module in model.modules() if isinstance(module, TPAAttention)]


def divergence(source: PreTrainedModel, model: PreTrainedModel) -> float:
    return agreement(source, model, random_blocks(count=8, length=32, seed=9)).kl


# ------------------------------------------------------------------------------- the stand-in


def test_the_full_width_is_the_source(source) -> None:
    expected = logits(source, text())
    with ExitStack() as stack:
        modules = [
            stack.enter_context(full_width(source_of(source), index))
            for index in range(source.config.num_hidden_layers)
        ]
        assert attentions(source) == modules
        found = logits(source, text(), use_cache=False)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        for module in modules:  # negative control
            module.scaling *= 1.1
        broken = logits(source, text(), use_cache=False)
        assert (broken - expected).abs().max() > 100 * TOLERANCE
    assert attentions(source) == []
    assert torch.equal(logits(source, text()), expected)


def test_moments_are_those_of_the_source(source, moments) -> None:
    """The second moments of keys and values as the source's own projections make them."""
    if not hasattr(source.model.layers[0].self_attn, "k_proj"):
        pytest.skip("a fused projection")
    layer = source.model.layers[1].self_attn
    found: list[Tensor] = []
    hooks = [
        projection.register_forward_hook(lambda *call: found.append(call[2].double()))
        for projection in (layer.k_proj, layer.v_proj)
    ]
    logits(source, random_blocks())
    for hook in hooks:
        hook.remove()
    value = found[1][:, 1:].flatten(0, 1)
    n = value.shape[1]
    centred = value - value.mean(0)
    covariance = centred.mT @ centred / len(value)
    torch.testing.assert_close(moments.layers[1].covariance[n:, n:], covariance, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        moments.layers[1].sink_mean[n:], found[1][:, 0].mean(0), atol=1e-4, rtol=0
    )
    assert (moments.layers[0].covariance[n:, n:] - covariance).abs().max() > 1e-2  # another layer


# ------------------------------------------------------------------------- cached and uncached


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(config=config),  # sliding where the family's layers are
    "dynamic without windows": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=4 * WINDOW),
}


def chunked(model: PreTrainedModel, tokens: Tensor, cache: Any, size: int) -> Tensor:
    parts = []
    for start in range(0, tokens.shape[1], size):
        part = tokens[:, start : start + size]
        positions = torch.arange(start, start + part.shape[1])[None]
        parts.append(logits(model, part, past_key_values=cache, position_ids=positions))
    return torch.cat(parts, dim=1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", CACHES)
def test_every_cache_gives_the_logits_of_a_full_pass(precise, kind) -> None:
    expected = logits(precise, text(), use_cache=False)
    whole = logits(precise, text(), past_key_values=CACHES[kind](precise.config))
    torch.testing.assert_close(whole, expected, atol=TOLERANCE, rtol=0)
    steps = stepwise(precise, text(), CACHES[kind](precise.config))
    torch.testing.assert_close(steps, expected, atol=TOLERANCE, rtol=0)
    for size in (1, 5):  # odd chunks, and one token at a time
        parts = chunked(precise, text(), CACHES[kind](precise.config), size)
        torch.testing.assert_close(parts, expected, atol=TOLERANCE, rtol=0)


def test_a_lost_byte_would_be_seen(precise, monkeypatch) -> None:
    """Negative control of the comparison above."""
    expected = logits(precise, text(), use_cache=False)
    update = DynamicCache.update

    def losing(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, keys, values, *args, **kwargs)
        values = values.clone()
        values[..., 0] = 0
        return keys, values

    monkeypatch.setattr(DynamicCache, "update", losing)
    found = stepwise(precise, text(), DynamicCache(config=precise.config))
    assert (found - expected).abs().max() > 100 * TOLERANCE


def codes(model: PreTrainedModel, cache: DynamicCache) -> Tensor:
    """All codes and headers that a cache holds."""
    found = []
    for shape, layer in zip(model.config.layer_shapes, cache.layers, strict=True):
        for rows, layout in ((layer.keys, shape.key_layout), (layer.values, shape.value_layout)):
            found += [part.flatten() for part in unpack_rows(rows, layout)]
    return torch.cat(found)


def test_steps_make_the_codes_of_a_full_pass(coded) -> None:
    """In fp32: at most one code in ten thousand is rounded the other way."""
    tokens = text(count=4, length=40)
    whole, steps = DynamicCache(), DynamicCache()
    logits(coded, tokens, past_key_values=whole)
    chunked(coded, tokens, steps, size=1)
    one, other = codes(coded, whole), codes(coded, steps)
    assert (one != other).sum() <= len(one) / 10_000
    shifted = DynamicCache()  # negative control: other positions are other tokens before
    logits(coded, tokens.roll(1, 1), past_key_values=shifted)
    assert (one != codes(coded, shifted)).sum() > len(one) / 100


def test_the_live_cache_has_the_promised_bytes(source, coded) -> None:
    promised = coded.config.cached_bytes
    assert sum(promised) <= sum(16 * 2 * 2 for _ in promised) / 4  # a quarter of the source's
    for tokens in (1, 7, 24):
        cache = DynamicCache()
        logits(coded, text(count=3, length=tokens), past_key_values=cache)
        for layer, nbytes in zip(cache.layers, promised, strict=True):
            assert layer.keys.dtype == layer.values.dtype == torch.uint8
            assert layer.keys.shape[:3] == layer.values.shape[:3] == (3, 1, tokens)
            assert layer.keys.nbytes + layer.values.nbytes == nbytes * 3 * tokens
    measured = cache_bytes(coded, tokens=WINDOW - 1)
    assert (measured.numbers, measured.code_bytes) == (0, sum(promised))
    assert measured.at(2) == measured.at(4) == sum(promised)
    assert cache_bytes(source, tokens=WINDOW - 1).at(2) >= 4 * sum(promised)


def test_left_padding_changes_nothing(precise) -> None:
    tokens, pad = text(count=1, length=WINDOW + 4), 5
    padded = torch.cat((torch.zeros(1, pad, dtype=torch.long), tokens), dim=1)
    mask = (torch.arange(padded.shape[1]) >= pad).long()[None]

    def generate(ids: Tensor, mask: Tensor) -> Tensor:
        output = precise.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        return torch.stack(output.logits, dim=1)

    expected = generate(tokens, torch.ones_like(tokens))
    torch.testing.assert_close(generate(padded, mask), expected, atol=TOLERANCE, rtol=0)
    seen = generate(padded, torch.ones_like(padded))  # padding that is attended to
    assert (seen - expected).abs().max() > 100 * TOLERANCE


def test_a_quantised_cache_is_refused_in_one_line(coded) -> None:
    class Quantised(QuantizedLayer):
        def __init__(self) -> None:
            raise AssertionError("it is refused before any layer of it is made")

    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = [], Quantised
    with pytest.raises(ValueError, match="coded in bits already: use a dynamic") as error:
        logits(coded, text(), past_key_values=cache)
    assert "\n" not in str(error.value)
    logits(coded, text(), past_key_values=DynamicCache())  # the stock one is not


# ------------------------------------------------------------------------------- loss


def test_more_bytes_lose_less(source, moments) -> None:
    """And the source's own bytes hardly anything."""
    losses = [
        divergence(source, convert_coded(source, moments=moments, kv_ratio=ratio))
        for ratio in (0.125, 0.25, 0.5)
    ]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.05 * losses[0]


def test_the_calibrated_metric_beats_the_identity(source, moments) -> None:
    """In a source whose keys and values do not all matter alike, over two budgets."""
    identity = torch.eye(len(moments.layers[0].key_metric)).double()
    layers = [
        replace(
            layer,
            key_metric=identity * layer.key_metric.diagonal().mean(),
            value_metric=identity * layer.value_metric.diagonal().mean(),
            key_size=torch.ones_like(layer.key_size),
        )
        for layer in moments.layers
    ]
    alike = replace(moments, layers=layers)
    losses = [
        math.prod(
            divergence(source, convert_coded(source, moments=m, kv_ratio=ratio))
            for ratio in (0.125, 0.25)
        )
        for m in (moments, alike)
    ]
    assert losses[0] < losses[1]


# ----------------------------------------------------------- saving, and without the package


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Any]]:
    """Logits of each family's export in memory, and as a process without the package has them."""
    models = {name: (MODELS[name](), convert_coded(MODELS[name](), key_blocks=2)) for name in NAMES}
    return without_package(models, text(), tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize("name", NAMES)
def test_exports_load_without_the_package(exports, name) -> None:
    expected, (module, found) = exports[name]
    assert module.startswith("transformers_modules.")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    other = exports[NAMES[NAMES.index(name) - 1]][0]
    assert (found - other).abs().max() > 1e-2  # what another export has is told apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_saved_and_loaded_is_the_same(source, moments, tmp_path, dtype) -> None:
    model = convert_coded(source, moments=moments, key_blocks=2, dtype=dtype)
    expected, promised = logits(model, text()), model.config.cached_bytes
    for directory in (tmp_path / "once", tmp_path / "again"):
        model.save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        assert torch.equal(logits(model, text()), expected)
        assert model.config.cached_bytes == promised
    # negative control: the highest codes, which are not saved, have to be made again
    for attention in attentions(model):
        attention.keys.coder.highest.zero_()
    assert (logits(model, text()) - expected).abs().max() > 1e-2
