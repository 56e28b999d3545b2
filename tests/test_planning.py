"""From budgets to shapes: what is promised is what the model caches, never more than allowed."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tpa_convert.errors import UserError
from tpa_convert.modeling import Form, LayerShape
from tpa_convert.modeling.tpa_llama import TPALlamaConfig
from tpa_convert.plans import Budget, Plan, plan_uniform

GROUPS, HEAD_DIM, LAYERS = 3, 8, 4
SOURCE_FLOATS = 2 * GROUPS * HEAD_DIM  # 48


def fields(groups: int = GROUPS, head_dim: int = HEAD_DIM, layers: int = LAYERS) -> dict[str, Any]:
    """What `Family.sizes` says, as far as a plan and a config need it."""
    return {
        "num_key_value_heads": groups,
        "num_attention_heads": 2 * groups,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "hidden_size": 2 * groups * head_dim,
        "key_norm": False,
    }


def plan(form: Form = "static", whole_heads: bool = False, **budget: Any) -> Plan:
    return plan_uniform(fields(), Budget(**budget), form=form, whole_heads=whole_heads)


def shape_of(plan: Plan) -> LayerShape:
    """The one shape that all layers have."""
    assert len(plan.layers) == LAYERS
    assert len(set(plan.layers)) == 1
    return plan.layers[0]


@pytest.mark.parametrize(
    ("floats", "widths"), [(128, (48, 80)), (72, (24, 48)), (9, (3, 6)), (2, (1, 1))]
)
def test_latent_keys_get_three_eighths(floats, widths) -> None:
    shape = shape_of(
        plan_uniform(fields(head_dim=64), Budget(kv_floats=floats), key_cache="latent")
    )
    assert (shape.width_k, shape.width_v) == widths


@pytest.mark.parametrize("form", ["static", "affine", "linear"])
def test_floats_bytes_and_ratio_say_the_same(form) -> None:
    by_floats = plan(form, kv_floats=30)
    assert by_floats == plan(form, kv_bytes=30 * LAYERS * 2)  # 16 bits a number
    assert by_floats == plan(form, kv_ratio=30 / SOURCE_FLOATS)


def test_bytes_count_16_bits_a_number() -> None:
    half = plan(kv_bytes=240)
    assert half == plan(kv_floats=30)
    assert half.kv_bytes == 240
    assert half.source_kv_bytes == 2 * SOURCE_FLOATS * LAYERS


def test_a_static_budget_is_halved_between_keys_and_values() -> None:
    shape = shape_of(plan(kv_floats=16))
    assert (shape.width_k, shape.width_v) == (8, 8)
    assert (shape.rank_k, shape.rank_v) == (1, 1)
    assert shape_of(plan(kv_floats=40)).rank_k == 3


@pytest.mark.parametrize(("floats", "widths"), [(14, (6, 8)), (15, (6, 9)), (15.9, (6, 9))])
def test_odd_budgets_are_used_up(floats, widths) -> None:
    """Keys come in rotary pairs; values take what is left."""
    shape = shape_of(plan(kv_floats=floats))
    assert (shape.width_k, shape.width_v) == widths


@pytest.mark.parametrize("form", ["affine", "linear"])
def test_contextual_head_factors_are_paid_for(form) -> None:
    """Two ranks for each of K and V, each with one head factor per key/value head: 12 numbers."""
    shape = shape_of(plan(form, kv_floats=28))
    assert (shape.rank_k, shape.rank_v) == (2, 2)
    assert (shape.width_k, shape.width_v) == (8, 8)
    assert plan(form, kv_floats=28).kv_floats == 28


@pytest.mark.parametrize(
    ("floats", "ranks"), [(16, (1, 1)), (24, (2, 1)), (31, (2, 1)), (47, (3, 2))]
)
def test_whole_heads(floats, ranks) -> None:
    """Widths are multiples of the head dim; an odd head goes to the keys."""
    shape = shape_of(plan(whole_heads=True, kv_floats=floats))
    assert (shape.rank_k, shape.rank_v) == ranks
    assert (shape.width_k, shape.width_v) == (8 * ranks[0], 8 * ranks[1])


def test_whole_contextual_heads_have_no_gauge_and_pay_for_head_factors() -> None:
    shape = shape_of(plan("linear", whole_heads=True, kv_floats=2 * (8 + 3)))
    assert (shape.key_gauge, shape.value_gauge) == ("none", "none")
    assert (shape.rank_k, shape.rank_v) == (1, 1)
    with pytest.raises(UserError, match=r"too small.*at least 22$"):
        plan("linear", whole_heads=True, kv_floats=21)


def test_the_gauge_is_absorbed_until_the_projections_would_grow() -> None:
    assert shape_of(plan(width_k=8, width_v=8)).key_gauge == "absorbed"
    assert shape_of(plan(width_k=10, width_v=4)).key_gauge == "applied"
    assert shape_of(plan(width_k=4, width_v=9)).value_gauge == "applied"


@pytest.mark.parametrize(
    ("form", "minimum"), [("static", 3), ("affine", 2 * 2 * 3 + 6), ("linear", 2 * 2 * 3 + 6)]
)
def test_the_minimum_is_named_and_can_be_built(form, minimum) -> None:
    assert plan(form, kv_floats=minimum).kv_floats == minimum
    with pytest.raises(UserError, match=rf"too small.*at least {minimum}$"):
        plan(form, kv_floats=minimum - 0.1)


@pytest.mark.parametrize("budget", [{"kv_floats": 48.5}, {"kv_ratio": 1.01}, {"kv_bytes": 777}])
def test_a_budget_above_the_source_is_refused(budget) -> None:
    with pytest.raises(UserError, match="above the source's 48"):
        plan(**budget)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give the budget once"),
        ({"kv_floats": 20, "kv_ratio": 0.5}, "give the budget once"),
        ({"kv_floats": 20, "rank_k": 1}, r"either a --kv-\* budget or ranks and widths, not both"),
        ({"kv_bytes": 400, "width_v": 4}, r"either a --kv-\* budget or ranks and widths, not both"),
    ],
)
def test_the_budget_is_given_once(budget, message) -> None:
    with pytest.raises(UserError, match=message):
        plan(**budget)


def test_ranks_outright_only_warn_when_nothing_is_saved() -> None:
    """The paper's layer at full rank caches its head factors on top of the source's numbers."""
    with pytest.warns(UserWarning, match="cache 66 .* the source caches 48"):
        full = plan("linear", whole_heads=True, rank_k=3, rank_v=3)
    assert full.kv_floats == 66
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan("linear", whole_heads=True, rank_k=1, rank_v=2).kv_floats == 33


def test_ranks_and_widths_outright() -> None:
    """A rank alone gives whole heads; a rank beside a width limits the components on a pair."""
    by_rank = plan(rank_k=1, rank_v=2)
    assert (shape_of(by_rank).width_k, shape_of(by_rank).width_v) == (8, 16)
    assert by_rank.rank_limit_k == 1
    assert plan(width_k=6, width_v=6).rank_limit_k is None
    assert plan("affine", rank_k=2, rank_v=1, width_k=8, width_v=4).rank_limit_k is None


@pytest.mark.parametrize(
    ("form", "whole_heads", "budget", "problem"),
    [
        ("static", False, {"width_k": 5, "width_v": 4}, "width_k must be even"),
        ("static", False, {"width_k": 0, "width_v": 4}, "must be positive"),
        ("static", False, {"width_k": 26, "width_v": 4}, "exceed the source's 24 keys"),
        ("static", False, {"width_k": 4, "width_v": 25}, "exceed .* 24 values"),
        ("static", False, {"rank_k": 1, "width_k": 10, "width_v": 4}, "rank_k=1 .* at most 8"),
        ("affine", False, {"rank_k": 2, "width_k": 6, "width_v": 4}, "rank_k=2 must divide"),
        ("static", True, {"width_k": 8, "width_v": 4}, "multiples of 8"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(form, whole_heads, budget, problem) -> None:
    with pytest.raises(UserError, match=problem):
        plan(form, whole_heads, **budget)


@pytest.mark.filterwarnings("ignore:these ranks and widths:UserWarning")  # ratios near 1
@pytest.mark.parametrize("form", ["static", "affine", "linear"])
@pytest.mark.parametrize("whole_heads", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 8),
    head_dim=st.integers(2, 64).map(lambda half: 2 * half),
    layers=st.integers(1, 3),
    ratio=st.floats(0.0, 1.0),
)
def test_never_above_the_budget_and_as_the_config_counts(
    form, whole_heads, groups, head_dim, layers, ratio
) -> None:
    """Also nearly used up: what is left would not pay for a head, or one feature of each rank."""
    source = fields(groups, head_dim, layers)
    floats = ratio * 2 * groups * head_dim
    contextual = 0 if form == "static" else groups
    rank = 1 if form == "static" else min(2, groups)
    cost = head_dim + contextual
    assume(floats >= (2 * cost if whole_heads else 2 * rank * contextual + 3 * rank))
    plan = plan_uniform(source, Budget(kv_floats=floats), form=form, whole_heads=whole_heads)
    del source["key_norm"]
    config = TPALlamaConfig(**source, tpa_layers=[asdict(layer) for layer in plan.layers])
    assert config.cached_floats == [plan.kv_floats] * layers
    assert plan.kv_floats <= floats
    most = 2 * groups * cost if whole_heads else floats
    assert plan.kv_floats > min(floats, most) - (cost if whole_heads else rank) - 1
