"""Every family: a row of checks, each beside a model that is broken so that the check must fail.

The source is a tiny random model of the family; windows are 8 tokens, texts are longer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from tests.conversions import convert_tiny, random_blocks, source_of, tiny_moments
from tests.exports import without_package
from tests.tiny_models import BUILT_LIKE, MODELS, SIZES, WINDOW, random_model
from tpa_convert.calibration.moments import Moments
from tpa_convert.families import FAMILIES
from tpa_convert.forward.cached import cache_of
from tpa_convert.forward.comparison import agreement
from tpa_convert.healing import HealingSettings, heal
from tpa_convert.modeling import given_cache
from tpa_convert.modeling.tpa_attention import TPAAttention
from tpa_convert.modeling.tpa_keys import KeyNorm
from tpa_convert.options.conversion import ConvertOptions
from tpa_convert.pipeline.prediction import predict
from tpa_convert.planning.search import plan_measured
from tpa_convert.planning.sensitivity import measure_sensitivity
from tpa_convert.refinement.least_squares import refit
from tpa_convert.refinement.regression import RefinementSettings, refine
from tpa_convert.sources.attention import rotated_dims

NAMES = list(MODELS)
KEYS = ["rotated", "latent"]
TOLERANCE = 1e-4
NARROW = {"kv_ratio": 0.5}


def test_the_table_has_every_family() -> None:
    types = {MODELS[name]().config.model_type for name in NAMES}
    assert types == {family.model_type for family in FAMILIES}


@pytest.fixture(scope="module", params=NAMES)
def source(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def moments(source) -> Moments:
    return tiny_moments(source)


trained = pytest.mark.parametrize(
    "source", [name for name in NAMES if name not in BUILT_LIKE], indirect=True, scope="module"
)


def test_attention_is_built_like_that_of_the_family_that_is_trained() -> None:
    def build(name: str) -> dict[str, Any]:
        model = MODELS[name]()
        names = source_of(model).family.names
        attention = attentions(convert_tiny(model))[0]
        rotated = None
        if attention.table_order is not None:
            rotated = rotated_dims(model.config, attention.head_dim, 0) < attention.head_dim
        return {
            "norm": attention.shape.key_norm,
            "pairs": names.pairs,
            "fused": names.fused,
            "partly rotated": rotated,
            "softcap": attention.softcap,
        }

    for name, other in BUILT_LIKE.items():
        assert other not in BUILT_LIKE
        assert build(name) == build(other), name
    assert build("qwen3") != build("llama") != build("phi") != build("glm4")


@pytest.fixture(scope="module", params=KEYS)
def narrowed(request: pytest.FixtureRequest, source, moments) -> PreTrainedModel:
    """At half of the cache, through the family's own decoder."""
    model = convert_tiny(source, key_cache=request.param, moments=moments, **NARROW)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def one_of(kinds: list[str], source: PreTrainedModel) -> str:
    """For what takes long: one kind of keys a family, the next one for the next family."""
    types = [family.model_type for family in FAMILIES]
    return kinds[types.index(source.config.model_type) % len(kinds)]


def attentions(model: PreTrainedModel) -> list[TPAAttention]:
    return [module for module in model.modules() if isinstance(module, TPAAttention)]


def logits(model: PreTrainedModel, tokens: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def text(count: int = 2, length: int = 3 * WINDOW) -> Tensor:
    return random_blocks(count=count, length=length, seed=5)


# ---------------------------------------------------------------------- the source at full width


@pytest.mark.parametrize("key_cache", KEYS)
@pytest.mark.parametrize("form", ["static", "affine"])
def test_full_width_is_the_source(source, moments, key_cache, form) -> None:
    if (form, key_cache) == ("affine", "latent"):
        pytest.skip("latent keys have constant head factors")
    converted = convert_tiny(source, key_cache=key_cache, form=form, moments=moments)
    expected = logits(source, text())
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(converted, text()), expected, atol=TOLERANCE, rtol=0)

    # Whatever belongs to the family alone has to be there: without it, the check fails.
    for attention in attentions(converted):
        attention.scaling *= 1.1
    assert (logits(converted, text()) - expected).abs().max() > 100 * TOLERANCE


def _no_norm(keys: Tensor, hide: bool = False) -> Tensor:
    return torch.ones_like(keys[..., :1])


def _no_norm_of_all(keys: Tensor, hide: bool = False) -> Tensor:
    return torch.ones_like(keys[:, :1, :, :1])


@pytest.mark.parametrize("key_cache", KEYS)
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_keys_that_the_norm_hides_count_in_it(name, key_cache) -> None:
    """Weights of the norm that are zero, as Gemma 3 has in most layers."""
    source = MODELS[name]()
    for layer in source.model.layers:
        weight = layer.self_attn.k_norm.weight
        weight.data[[1, 6]] = -1.0 if name == "gemma3" else 0.0  # Gemma's is 1 + weight
    expected = logits(source, text())
    converted = convert_tiny(source, key_cache=key_cache)
    found = logits(converted, text())
    bound = TOLERANCE if key_cache == "latent" else 10 * TOLERANCE  # rotated keys cannot hide them
    assert (found - expected).abs().max() < bound
    for attention in attentions(converted):
        attention.keys.norm.weight.data[[1, 6]] = 1.0
    assert (logits(converted, text()) - expected).abs().max() > 100 * TOLERANCE


def test_norms_of_queries_and_keys_matter(source, moments) -> None:
    """The check above sees QK-norm: a layer without one of the two is another model."""
    expected = logits(source, text())
    if not source_of(source).family.key_norm:
        converted = convert_tiny(source, moments=moments)
        assert not any(isinstance(module, KeyNorm) for module in converted.modules())
        return
    for key_cache in KEYS:
        for part in ("keys", "queries"):
            converted = convert_tiny(source, key_cache=key_cache, moments=moments)
            for attention in attentions(converted):
                if part == "queries":
                    attention.q_norm = None
                else:
                    norm = attention.keys.norm
                    norm.forward = _no_norm_of_all if norm.all_heads else _no_norm
            assert (logits(converted, text()) - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("share", [0.5, 0.75, 0.45])
@pytest.mark.parametrize("key_cache", KEYS)
def test_a_part_of_each_head_is_rotated(share, key_cache) -> None:
    """Also where the share of 12 dimensions is no whole number of pairs."""
    sizes = SIZES | {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = Phi3Config(**sizes, partial_rotary_factor=share)
    source = random_model(Phi3ForCausalLM, config)
    found = logits(convert_tiny(source, key_cache=key_cache), text())
    torch.testing.assert_close(found, logits(source, text()), atol=TOLERANCE, rtol=0)


def test_windows_matter(source, moments) -> None:
    """The check above sees windows: texts longer than one differ where they are taken away."""
    wide = convert_tiny(source, moments=moments)
    windows = [attention.sliding_window for attention in attentions(wide)]
    assert (WINDOW in windows) == (getattr(source.config, "sliding_window", None) is not None)
    if WINDOW not in windows:
        return
    expected = logits(source, text())
    wide.config.sliding_window = 1000
    assert (logits(wide, text()) - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.gpu
def test_a_source_on_a_gpu_is_converted_and_planned(source) -> None:
    """Moments and decompositions are on the CPU wherever the source is."""
    expected = convert_tiny(source, **NARROW)
    there = copy.deepcopy(source).cuda()
    converted = convert_tiny(there, **NARROW)
    torch.testing.assert_close(
        logits(converted, text()), logits(expected, text()), atol=1e-2, rtol=0
    )
    moments = tiny_moments(there)
    report = measure_sensitivity(source_of(there), moments, text())
    assert all(layer.keys.losses[0] > 0 for layer in report)


# ------------------------------------------------------------------------- cached and uncached


def stepwise(model: PreTrainedModel, tokens: Tensor, cache: Any, first: int = 5) -> Tensor:
    steps = []
    with torch.no_grad():
        for start, end in [(0, first), *((t, t + 1) for t in range(first, tokens.shape[1]))]:
            positions = torch.arange(start, end)[None]
            output = model(
                tokens[:, start:end], past_key_values=cache, position_ids=positions, use_cache=True
            )
            steps.append(output.logits)
    return torch.cat(steps, dim=1)


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(config=config),  # sliding where the family's layers are
    "static": lambda config: StaticCache(config=config, max_cache_len=4 * WINDOW),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", CACHES)
def test_every_step_has_the_logits_of_a_full_pass(narrowed, kind) -> None:
    expected = logits(narrowed, text(), use_cache=False)
    cache = CACHES[kind](narrowed.config)
    torch.testing.assert_close(stepwise(narrowed, text(), cache), expected, atol=TOLERANCE, rtol=0)
    kinds = getattr(narrowed.config, "layer_types", None)
    if kinds is not None:
        assert [layer.is_sliding for layer in cache.layers] == [
            kind == "sliding_attention" for kind in kinds
        ]

    if kind != "dynamic":
        return

    def forgetful(arguments: dict[str, Any], pop: bool = False) -> None:
        given_cache(arguments, pop)

    with pytest.MonkeyPatch.context() as patch:  # a layer that misses the cache
        patch.setattr("tpa_convert.modeling.tpa_attention.given_cache", forgetful)
        broken = stepwise(narrowed, text(), DynamicCache(config=narrowed.config))
    assert (broken - expected).abs().max() > 100 * TOLERANCE


def test_left_padding_changes_nothing(narrowed) -> None:
    tokens, pad = text(count=1, length=WINDOW + 4), 5  # near enough to be seen through windows
    padded = torch.cat((torch.zeros(1, pad, dtype=torch.long), tokens), dim=1)
    mask = (torch.arange(padded.shape[1]) >= pad).long()[None]
    settings = {"max_new_tokens": 12, "do_sample": False, "output_logits": True}

    def generate(ids: Tensor, mask: Tensor) -> Tensor:
        output = narrowed.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, **settings
        )
        return torch.stack(output.logits, dim=1)

    expected = generate(tokens, torch.ones_like(tokens))
    torch.testing.assert_close(generate(padded, mask), expected, atol=TOLERANCE, rtol=0)
    seen = generate(padded, torch.ones_like(padded))  # padding that is attended to
    assert (seen - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("key_cache", KEYS)
def test_what_is_predicted_is_cached(source, moments, key_cache) -> None:
    tokens = text(count=1, length=WINDOW - 2)
    options = ConvertOptions(kv_ratio=0.5, cache_bits="16", key_cache=key_cache)
    prediction = predict(source.config, options)
    converted = convert_tiny(source, key_cache=key_cache, moments=moments, **NARROW)
    for expected, model in (
        (prediction.source_kv_bytes, source),
        (prediction.kv_bytes, converted),
    ):
        with torch.no_grad():
            layers = cache_of(model(tokens, use_cache=True)).layers
        held = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
        assert expected == 2 * held / tokens.shape[1]
    assert prediction.kv_bytes < 0.51 * prediction.source_kv_bytes
    assert prediction.source_parameters == source.num_parameters()
    assert prediction.parameters == converted.num_parameters()


# ----------------------------------------------------------- calibration, refinement, healing


def another(source: PreTrainedModel) -> PreTrainedModel:
    """A model of the same sizes with other weights."""
    config = copy.deepcopy(source.config)
    config.dtype = source.dtype  # saving leaves its name there
    return random_model(type(source), config, seed=8)


def divergence(source: PreTrainedModel, model: PreTrainedModel) -> float:
    return agreement(source, model, random_blocks(count=32, length=32, seed=9), batch_size=32).kl


@trained
@pytest.mark.parametrize("key_cache", KEYS)
def test_calibration_pays(source, key_cache) -> None:
    source = copy.deepcopy(source)  # whose attention reads some inputs far more than others
    layers = source.get_decoder().layers
    scales = torch.logspace(0.5, -1.5, 32)
    norms = [getattr(layer, "input_layernorm", None) for layer in layers]
    if hasattr(norms[0], "weight"):
        for norm in norms:
            norm.weight.data *= scales
    else:  # no norm before the attention (OLMo 2), or one without weights (OLMo)
        source.get_input_embeddings().weight.data *= scales
    given: dict[str, Any] = {"key_cache": key_cache, "moments": tiny_moments(source)}
    calibrated = convert_tiny(source, **given, **NARROW)
    weights_alone = convert_tiny(source, whiten=False, **given, **NARROW)
    lost = divergence(source, calibrated)
    assert lost < divergence(source, weights_alone)
    exact = convert_tiny(source, **given)
    assert divergence(source, exact) < 1e-6 < lost


@trained
def test_narrower_parts_lose_more(source, moments) -> None:
    """What a plan rests on: each part of a layer alone, the rest being the source."""
    key_cache = one_of(KEYS, source)
    report = measure_sensitivity(source_of(source), moments, text(count=4), key_cache=key_cache)
    assert len(report) == source.config.num_hidden_layers
    sizes = source_of(source).family.attention_sizes(source.config)
    for floats in (14, 17):  # and a plan made of it keeps to its budget, norms of keys included
        plan = plan_measured(report, sizes, floats, multiple_of=2, key_cache=key_cache)
        assert floats - 2 < plan.kv_floats <= floats
    for part in (part for layer in report for part in (layer.keys, layer.values)):
        assert part.losses[0] > part.losses[-1] > 0
        assert part.loss(torch.tensor(part.step * (len(part.error) - 1))) == 0  # at full width


@trained
def test_refit_and_refinement_lower_the_loss(source, moments) -> None:
    kind = one_of(KEYS, source)
    narrowed = convert_tiny(source, key_cache=kind, moments=moments, **NARROW)
    blocks = random_blocks(count=96, length=32, seed=3)
    before = divergence(source, narrowed)
    settings = RefinementSettings(steps=20, batch_size=8, checks=2)
    for improve, bound in (
        # Least squares of one projection: so little in models of this size that what the layers
        # behind make of it may be worse by chance.
        (lambda model: refit(source, model, blocks), 1.03 * before),
        (lambda model: refine(source, model, blocks, settings), before),
    ):
        model = copy.deepcopy(narrowed)
        report = improve(model)
        assert all(layer.after < layer.before for layer in report)
        assert divergence(source, model) < bound
    model = copy.deepcopy(narrowed)  # towards another model, it does not
    refine(another(source), model, blocks, settings)
    assert divergence(source, model) > before


@trained
def test_healing_lowers_the_loss(source, moments, tmp_path) -> None:
    kind = one_of(KEYS[::-1], source)
    narrowed = convert_tiny(source, key_cache=kind, moments=moments, **NARROW)
    blocks = random_blocks(count=128, length=32, seed=4)
    before = divergence(source, narrowed)

    def healed(teacher: PreTrainedModel, name: str) -> float:
        student = copy.deepcopy(narrowed)
        settings = HealingSettings(
            tokens=32 * 256,
            tokens_per_step=256,
            block_length=32,
            attention_learning_rate=3e-3,
            learning_rate=1e-3,
            warmup_steps=4,
            hidden_weight=0.0,
        )
        heal(
            student,
            copy.deepcopy(teacher),
            None,
            blocks,
            settings=settings,
            output_dir=tmp_path / name,
            progress=False,
        )
        return divergence(source, student)

    # Another teacher leads elsewhere, or not as near.
    assert healed(source, "source") < 0.92 * before
    assert healed(another(source), "another") > 0.92 * before


# ------------------------------------------------------------------ exports without the package


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Logits of each family's exports in memory, and as a process without the package has them."""
    models = {}
    for name in NAMES:
        source = MODELS[name]()
        moments = tiny_moments(source)
        for key_cache in KEYS:
            model = convert_tiny(source, key_cache=key_cache, moments=moments, **NARROW)
            models[f"{name}-{key_cache}"] = source, model
    return without_package(models, text(), tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize("key_cache", KEYS)
@pytest.mark.parametrize("name", NAMES)
def test_exports_load_without_the_package(exports, name, key_cache) -> None:
    expected, (module, found) = exports[f"{name}-{key_cache}"]
    assert module.startswith("transformers_modules.")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    other = exports[f"{name}-{KEYS[1 - KEYS.index(key_cache)]}"][0]
    assert (found - other).abs().max() > 1e-2  # what another export has is told apart
