"""Budgets, plans and commands of caches that are coded in bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_tiny_tokenizer
from tests.conversions import coded_moments, random_blocks, source_of, tiny_moments
from tests.tiny_models import MODELS
from tpa_convert.calibration.cache_moments import collect_cache_moments
from tpa_convert.conversion.coded import choose_codes
from tpa_convert.conversion.model import convert_model
from tpa_convert.errors import UserError
from tpa_convert.forward.comparison import agreement
from tpa_convert.forward.quantised import quantise, quantised_source, share_of_bytes
from tpa_convert.planning.coded import BITS, search_coded
from tpa_convert.planning.search import PlanReport
from tpa_convert.plans import Budget, Plan, load_plan, plan_coded, plan_to_yaml
from tpa_convert.plans.coded import WIDEST_BLOCK, default_blocks
from tpa_convert.plans.cost import rebuilding_per_byte
from tpa_convert.sources import load_source, open_source


def fields(groups: int = 2, head_dim: int = 8, layers: int = 2) -> dict[str, Any]:
    return {
        "num_key_value_heads": groups,
        "num_attention_heads": 2 * groups,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "hidden_size": 32,
        "key_norm": False,
    }


@pytest.fixture(scope="module")
def measured(tiny_llama):
    source = source_of(tiny_llama("gqa"))
    return source, coded_moments(source.model)


# ------------------------------------------------------------------------------- budgets


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 8),
    head_dim=st.integers(1, 64).map(lambda half: 2 * half),
    layers=st.integers(1, 40),
    ratio=st.floats(0.01, 1.0),
)
def test_floats_bytes_and_ratio_say_the_same(groups, head_dim, layers, ratio) -> None:
    sizes = fields(groups, head_dim, layers)
    total = int(ratio * 2 * groups * head_dim) * layers * 2
    if total < 2 * layers * 4:
        with pytest.raises(UserError, match="is too small"):
            plan_coded(sizes, Budget(kv_bytes=total))
        return
    plan = plan_coded(sizes, Budget(kv_bytes=total))
    assert plan.is_coded
    assert plan.kv_bytes == total
    assert plan_coded(sizes, Budget(kv_floats=plan.kv_floats)) == plan
    assert plan.source_kv_bytes == 4 * groups * head_dim * layers
    assert plan.coded is not None
    assert head_dim // 2 % plan.coded.key_blocks == 0


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ({"kv_ratio": 1.01}, {}, "above the source's 32"),
        ({"kv_bytes": 15}, {}, "15 bytes per token is too small: 2 layers need at least 16 bytes"),
        ({"kv_bytes": 15}, {"bits": 3}, "15 bytes per token .* at least 16 bytes"),
        ({"kv_floats": 0.5}, {}, "is too small"),
        ({"kv_ratio": 0.5}, {"key_blocks": 3}, "must divide the 4 rotary pairs of a head, not 3"),
        ({"kv_ratio": 0.5}, {"key_blocks": 8}, "must divide the 4 rotary pairs of a head, not 8"),
        ({}, {}, "give the budget once"),
        ({"kv_ratio": 0.5, "kv_floats": 3}, {}, "give the budget once"),
        ({"width_k": 4, "width_v": 4}, {}, "give the budget once"),
    ],
)
def test_impossible_budgets_are_refused(budget, options, message) -> None:
    with pytest.raises(UserError, match=message):
        plan_coded(fields(), Budget(**budget), **options)
    plan_coded(fields(), Budget(kv_bytes=16))


@pytest.mark.parametrize(
    ("groups", "head_dim", "blocks"), [(2, 8, 1), (3, 64, 1), (8, 64, 2), (8, 128, 4), (2, 250, 1)]
)
def test_blocks_are_as_few_as_decode_quickly(groups, head_dim, blocks) -> None:
    assert default_blocks(fields(groups, head_dim)) == blocks
    if blocks > 1:
        assert groups * head_dim > blocks // 2 * WIDEST_BLOCK


def test_a_dry_run_knows_the_blocks_of_codes_that_are_still_to_be_chosen() -> None:
    sizes, budget = fields(8, 128, 32), Budget(kv_ratio=0.25)
    found = [
        rebuilding_per_byte(plan_coded(sizes, budget, key_blocks=blocks)) for blocks in (1, 4, None)
    ]
    assert found == [512, 128, 128]


@settings(deadline=None, max_examples=20)
@given(st.integers(16, 64), st.sampled_from((None, 1, 2, 3, 4, 8)), st.sampled_from((1, 2, 4)))
def test_chosen_codes_keep_to_the_budget(measured, total, bits, blocks) -> None:
    moments = measured[1]
    plan = plan_coded(fields(), Budget(kv_bytes=total), bits=bits, key_blocks=blocks)
    chosen = choose_codes(plan, moments.layers, moments.num_tokens)
    assert chosen.plan.coded is None
    assert chosen.plan.kv_bytes <= total
    assert chosen.nats > 0
    for shape in chosen.plan.layers:
        assert shape.problem(8) is None
        assert shape.key_blocks == blocks
        for layout in (shape.key_layout, shape.value_layout):
            assert layout.row_bytes % 4 == 0
            assert layout.components >= 1


def test_a_mean_of_bits_is_passed_on(measured) -> None:
    """Rows of 12 bytes are whole words and whole tiers, which leaves means between those asked for;
    `test_coding_decisions` has them in rows that are long enough."""
    moments, means = measured[1], []
    for bits in (1, 2, 4, 8):
        plan = plan_coded(fields(), Budget(kv_bytes=48), bits=bits)
        chosen = choose_codes(plan, moments.layers, moments.num_tokens).plan
        parts = [layout for x in chosen.layers for layout in (x.key_layout, x.value_layout)]
        each = [count for layout in parts for count in layout.bits]
        means.append(sum(each) / len(each))
    assert means[0] == 1 < means[1] < means[2] < means[3] == 8


# ------------------------------------------------------------------------- the source, quantised


def test_numbers_are_rounded_in_groups() -> None:
    x = torch.randn(2, 3, 70, 8, generator=torch.Generator().manual_seed(0))
    for dim in (2, 3):
        errors = [(quantise(x, bits, dim) - x).abs().max().item() for bits in (2, 3, 4, 8)]
        assert errors[0] > errors[1] > errors[2] > errors[3] > 0
        spread = x.max() - x.min()
        for bits, error in zip((2, 3, 4, 8), errors, strict=True):
            assert error <= spread / (2**bits - 1) / 2 + 1e-6
    first = x.clone()
    first[:, :, 32:] = 0  # another group says nothing of this one
    assert torch.equal(quantise(first, 4, 2)[:, :, :32], quantise(x, 4, 2)[:, :, :32])
    assert not torch.equal(quantise(first, 4, 3)[:, :, 32:], quantise(x, 4, 3)[:, :, 32:])


def test_a_quantised_source_loses_by_its_bits(measured) -> None:
    source, _ = measured
    tokens = random_blocks(count=4, length=40, seed=9)
    before = source.model(tokens).logits
    losses = [agreement(source.model, quantised_source(source.model, b), tokens).kl for b in BITS]
    assert list(BITS) == [8, 4, 3, 2]
    assert losses == sorted(losses)
    assert losses[0] < 1e-3 * losses[-1]
    assert torch.equal(source.model(tokens).logits, before)  # which is left as it was
    assert [share_of_bytes(bits) for bits in BITS] == [9 / 16, 5 / 16, 4 / 16, 3 / 16]


# ------------------------------------------------------------------------------- search


@pytest.fixture(scope="module")
def report(measured) -> PlanReport:
    source, moments = measured
    plans = [plan_coded(fields(), Budget(kv_ratio=share)) for share in (0.5, 0.25, 0.125)]
    blocks = random_blocks(count=4, length=32, seed=9)
    return search_coded(
        source, moments, blocks, plans, wanted=plans[1], max_increase=0.1, context=100
    )


def test_candidates_fall_with_their_bytes(report) -> None:
    found = report.candidates
    assert [candidate.budget for candidate in found] == [16, 8, 4]
    kl = [candidate.kl for candidate in found]
    assert kl[0] < kl[1] < kl[2]
    predicted = [candidate.predicted_kl for candidate in found]
    assert predicted[0] < predicted[1] < predicted[2]
    assert report.chosen == 1  # what was wanted, whatever it loses
    for candidate, expected in zip(found, predicted, strict=True):
        assert candidate.plan.kv_floats <= candidate.budget
        assert candidate.split == "coded"
        assert 0.2 < expected / candidate.kl < 5  # a prediction, of the right size


def test_int8_loses_next_to_nothing_and_int2_much(report) -> None:
    by_bits = {one.bits: one for one in report.quantised}
    assert list(by_bits) == list(BITS)
    assert by_bits[8].kl < 1e-3
    assert by_bits[8].perplexity_ratio == pytest.approx(1, abs=0.01)
    assert by_bits[2].kl > 100 * by_bits[8].kl
    assert by_bits[4].share == 5 / 16


def test_a_candidate_is_what_its_model_loses(measured, report) -> None:
    source, moments = measured
    blocks = random_blocks(count=4, length=32, seed=9)
    candidate = report.candidates[2]
    model = convert_model(source, candidate.plan, moments)
    assert agreement(source.model, model, blocks).kl == pytest.approx(candidate.kl, rel=1e-4)
    other = convert_model(source, report.candidates[1].plan, moments)  # negative control
    assert agreement(source.model, other, blocks).kl < 0.9 * candidate.kl


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_a_source_that_is_not_in_memory_gives_the_same_report(family, tmp_path) -> None:
    model, blocks = MODELS[family](), random_blocks(count=4, length=32, seed=9)
    model.save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    whole, opened = load_source(tmp_path), open_source(tmp_path)
    sizes = whole.family.attention_sizes(whole.model.config)
    plans = [plan_coded(sizes, Budget(kv_ratio=share)) for share in (0.5, 0.25)]
    arguments: dict[str, Any] = {"wanted": plans[1], "max_increase": 0.1, "context": 100}
    reports = []
    for source in (whole, opened):
        moments = collect_cache_moments(source, random_blocks())
        reports.append(search_coded(source, moments, blocks, plans, **arguments))
    assert reports[0] == reports[1]
    assert all(parameter.is_meta for parameter in opened.model.parameters())
    for quantised in reports[1].quantised:  # side by side in one walk, and as a model of its own
        other = quantised_source(whole.model, quantised.bits)
        expected = agreement(whole.model, other, blocks).kl
        assert quantised.kl == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert whole.model.config._attn_implementation == opened.model.config._attn_implementation


def test_without_a_wanted_plan_the_smallest_within_the_accepted_loss(measured, report) -> None:
    source, moments = measured
    plans = [plan_coded(fields(), Budget(kv_ratio=share)) for share in (0.5, 0.25, 0.125)]
    blocks = random_blocks(count=4, length=32, seed=9)
    arguments: dict[str, Any] = {"wanted": None, "context": 100}
    for index in range(3):
        accepted = 1.01 * torch.tensor(report.candidates[index].kl).expm1().item()
        found = search_coded(source, moments, blocks, plans, max_increase=accepted, **arguments)
        assert found.chosen == index
    with pytest.raises(UserError, match="no budget on the curve keeps the loss"):
        search_coded(source, moments, blocks, plans, max_increase=1e-9, **arguments)


# ------------------------------------------------------------------------------- moments


def test_moments_of_the_wrong_kind_and_of_another_source(measured) -> None:
    source, moments = measured
    plan = plan_coded(fields(), Budget(kv_ratio=0.25))
    chosen = choose_codes(plan, moments.layers, moments.num_tokens).plan
    convert_model(source, chosen, moments)
    with pytest.raises(UserError, match=r"made for a cache of 16 bits.*coded in bits"):
        convert_model(source, chosen, tiny_moments(source.model))
    plain = Plan([plan.layers[0]] * 2, 2, 8)
    with pytest.raises(UserError, match=r"made for a cache coded in bits.*of 16 bits"):
        convert_model(source, plain, moments)
    with pytest.raises(UserError, match="needs calibration moments"):
        convert_model(source, chosen, None)
    with pytest.raises(UserError, match="made from another source"):
        moments.check("1" * 64, True)


# ------------------------------------------------------------------------------- files


def test_a_coded_plan_survives_its_file(measured, tmp_path) -> None:
    _, moments = measured
    path = tmp_path / "plan.yaml"
    for blocks in (1, 2):
        budget = Budget(kv_ratio=0.25)
        plan = plan_coded(fields(), budget, key_blocks=blocks)
        plan = choose_codes(plan, moments.layers, moments.num_tokens).plan
        path.write_text(plan_to_yaml(plan, {"id": "tiny"}))
        assert load_plan(path, fields()) == plan


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("key_codes", "row_codes", "key_codes and value_codes are both given or neither"),
        ("value_gauge: applied", "value_gauge: absorbed", "coded values have value_gauge"),
        ("key_cache: latent", "key_cache: rotated", "coded keys are latent"),
        ("row_align: 2", "row_align: 0", "row_align"),
        ("row_align: 2", "row_align: -4", "row_align"),
        ("row_align: 2", "row_align: two", "row_align holds something that is no int"),
        ("CODES", "9x4", "codes have 1 to 8 bits"),
        ("CODES", "'0x4'", "codes have 1 to 8 bits"),
        ("CODES", "4x0", "codes have 1 to 8 bits"),
        ("CODES", "4x", "codes have 1 to 8 bits"),
        ("CODES", "many", "codes have 1 to 8 bits"),
        ("CODES", "2x3", "there are other codes"),
        ("CODES", "2x3 | 2x3 | 2x2", "blocks of codes cannot divide 4 rotary pairs"),
    ],
)
def test_bad_coded_plans_are_told_apart(tmp_path, old, new, message) -> None:
    good = (
        "{num_key_value_heads: 2, head_dim: 8, form: static, key_gauge: applied, "
        "value_gauge: applied, rank_k: 1, rank_v: 1, width_k: 8, width_v: 8, key_cache: latent, "
        "key_codes: CODES, value_codes: 2x8, row_align: 2, predict_values: true}"
    )
    path = tmp_path / "plan.yaml"
    path.write_text(good.replace("CODES", "4x2 2x6"))
    load_plan(path, fields())
    path.write_text(good.replace(old, new).replace("CODES", "4x2 2x6"))
    with pytest.raises(UserError, match=message) as error:
        load_plan(path, fields())
    assert "\n" not in str(error.value)
