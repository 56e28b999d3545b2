"""The real model in the repository: exact at full width, and the gauge pays at half the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tpa_convert.calibration.moments import Moments, collect_moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.forward.comparison import perplexity
from tpa_convert.modeling import Form
from tpa_convert.plans import Budget, plan_uniform
from tpa_convert.sources import Source, load_source
from tpa_convert.text.read import default_calibration_documents, load_documents, token_blocks

FOLDER = Path(__file__).parents[1] / "recipes" / "embedded_model"


@pytest.fixture(scope="module")
def source() -> Source:
    return load_source(FOLDER / "model")


@pytest.fixture(scope="module")
def moments(source: Source) -> Moments:
    documents = default_calibration_documents()
    return collect_moments(source, token_blocks(documents, source.tokenizer, 256, 32, seed=0))


@pytest.fixture(scope="module")
def held_out(source: Source) -> torch.Tensor:
    documents = load_documents(FOLDER / "valid.txt.xz")
    return token_blocks(documents, source.tokenizer, 256, 16)


def convert(
    source: Source,
    moments: Moments,
    budget: Budget,
    *,
    form: Form = "static",
    method: str = "gauge",
    whiten: bool = True,
) -> PreTrainedModel:
    sizes = source.family.attention_sizes(source.model.config)
    plan = plan_uniform(sizes, budget, form=form, whole_heads=method == "svd")
    return convert_model(source, plan, moments, method=method, whiten=whiten)


@pytest.mark.parametrize(
    ("form", "method"), [("static", "gauge"), ("static", "svd"), ("affine", "svd")]
)
@pytest.mark.filterwarnings("ignore:these ranks and widths")
def test_full_width_is_the_source(source, moments, held_out, form, method) -> None:
    budget = Budget(rank_k=6, rank_v=6)
    converted = convert(source, moments, budget, form=form, method=method)
    with torch.no_grad():
        expected, logits = source.model(held_out[:2]).logits, converted(held_out[:2]).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_half_the_cache_is_better_with_the_gauge_than_with_plain_svd(
    source, moments, held_out
) -> None:
    budget = Budget(kv_ratio=0.5)
    gauge = convert(source, moments, budget)
    svd = convert(source, moments, budget, method="svd", whiten=False)
    assert gauge.config.cached_floats == svd.config.cached_floats == [192] * 6
    scores = [perplexity(model, held_out).perplexity for model in (source.model, gauge, svd)]
    assert scores[0] < scores[1] < scores[2] / 1.05
