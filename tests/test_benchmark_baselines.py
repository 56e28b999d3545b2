"""Baselines and variants of the ablation: exact where they must be, optimal in what they minimise,
and their statistics against sums over the model's own attention."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.benchmarks import benchmark
from tests.conftest import make_tiny_llama
from tests.conversions import convert_tiny, random_blocks, source_of, tiny_moments
from tests.test_moments import BLOCKS, observe
from tpa_convert.decomposition import AttentionWeights, LayerMoments
from tpa_convert.decomposition.factors import to_complex_pairs, to_half_split
from tpa_convert.planning.sensitivity import measure_sensitivity
from tpa_convert.plans import Budget, plan_uniform

baselines, variants, layer_statistics = map(
    benchmark, ("common.baselines", "common.variants", "common.layer_statistics")
)
FULL = 16  # numbers of all keys, or values, of two heads of 8


class Bench:
    """A tiny source with its statistics, as the ablation has them."""

    def __init__(self, shape: str = "gqa", **overrides: Any):
        self.model = make_tiny_llama(shape, seed=4, **overrides)
        self.source = source_of(self.model)
        self.statistics = layer_statistics.collect(self.source, random_blocks())
        self.weights = layer_statistics.layer_weights(self.source)

    def changed(self, change: Any, width_k: int, width_v: int) -> Any:
        """The source with the weights that `change` makes of every layer."""
        layers = self.statistics.layers
        return baselines.changed(self.model, change, self.weights, layers, width_k, width_v)

    def plan(self, floats: int, **settings: Any) -> Any:
        config = self.source.family.attention_sizes(self.model.config)
        return plan_uniform(config, Budget(kv_floats=floats), **settings)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope="module")
def layer(bench) -> tuple[AttentionWeights, Any]:
    return bench.weights[0], bench.statistics.layers[0]


def difference(model: Any, other: Any) -> float:
    tokens = random_blocks(count=2, length=33, seed=1)
    with torch.no_grad():
        return (model(tokens).logits - other(tokens).logits).abs().max().item()


# ------------------------------------------------------------------------------- exact cases

CHANGES = [
    baselines.joint_svd,
    baselines.whitened_joint_svd,
    baselines.mean_pooled,
    baselines.aligned_pooled,
    variants.closed_form,
    variants.tokens_alike,
    variants.uncentred_keys,
    variants.value_constant,
    variants.attention_per_head,
]


@pytest.mark.parametrize("change", CHANGES)
def test_at_full_width_a_change_is_the_source(bench, change) -> None:
    assert difference(bench.changed(change, FULL, FULL), bench.model) < 1e-3
    assert difference(bench.changed(change, FULL // 2, FULL // 2), bench.model) > 0.1


@torch.no_grad()
def test_models_at_full_width_are_the_source(bench) -> None:
    plan, narrow = (bench.plan(floats, gauge="absorbed") for floats in (2 * FULL, FULL))
    blocks = random_blocks(count=4)
    makers = {
        # a context so long that no two pairs are folded
        "folded": lambda plan: variants.folded_model(
            bench.source, plan, bench.statistics, context=10**9
        ),
        "sequential": lambda plan: variants.sequential_model(
            bench.source, plan, bench.statistics, blocks
        ),
    }
    for name, make in makers.items():
        assert difference(make(plan), bench.model) < 1e-3, name
        assert difference(make(narrow), bench.model) > 0.1, name


def test_queries_refitted_at_full_width_are_the_source(bench) -> None:
    plan = bench.plan(2 * FULL, gauge="absorbed")
    model = variants.queries_refitted(bench.source, plan, bench.statistics)
    assert difference(model, bench.model) < 0.01  # the refit has a ridge of 1e-4


def test_rebuilt_weights_are_those_of_the_converted_model(bench) -> None:
    """The source with narrowed weights and the TPA model that caches less compute the same."""
    rebuilt = bench.changed(variants.closed_form, 8, 8)
    converted = convert_tiny(
        bench.model, width_k=8, width_v=8, moments=tiny_moments(bench.model), gauge="applied"
    )
    assert difference(rebuilt, converted) < 1e-3


NOT_EXACT = re.compile(
    "CP|affine|folded|shared by K and V"  # what they leave out is not only what is narrowed
    "|K : V = (?!1 : 1)"  # parts larger than the source's
    "|W_Q refitted"  # see the test of it
)


@torch.no_grad()
def test_every_row_of_the_ablation() -> None:
    """Each caches its budget and loses something by it; at full width most are the source."""
    ablation = benchmark("ablation_smollm2")
    full, half = 2 * 64, 64
    bench = Bench("mha", hidden_size=64, head_dim=16)
    config = bench.source.family.attention_sizes(bench.model.config)
    blocks = random_blocks(count=4)
    sensitivity = measure_sensitivity(bench.source, bench.statistics, blocks)
    shared = ablation.Bench(
        bench.source, config, bench.statistics, blocks, sensitivity, bench.weights
    )
    rows = {"closed form": lambda b, n: b.converted(b.uniform(n))}
    rows |= ablation.BASELINES | ablation.OPTIONS
    rows |= {name: make for name, (make, _) in ablation.REFINED.items()}
    exact = 0
    for name, make in rows.items():
        narrowed = make(shared, half)
        assert difference(narrowed, bench.model) > 0.1, name
        floats = getattr(narrowed.config, "cached_floats", [half] * 2)  # else a source's class
        assert half - 8 <= sum(floats) / 2 <= half, name
        if not NOT_EXACT.search(name):
            assert difference(make(shared, full), bench.model) < 2e-3, name
            exact += 1
    assert exact > len(rows) / 2


# ------------------------------------------------------------------------------- what is optimal


def discarded(weight: Tensor, moment: Tensor, width: int) -> Tensor:
    """The least error of a rank, as the sum of the eigenvalues it leaves out."""
    rows = weight.flatten(0, 1)
    return torch.linalg.eigvalsh(rows @ moment @ rows.mT)[: len(rows) - width].sum()


@pytest.mark.parametrize("widths", [(3, 11), (8, 8)])
@pytest.mark.parametrize("whitened", [False, True])
def test_a_joint_svd_has_the_least_error_of_its_rank(layer, whitened, widths) -> None:
    weights, statistics = layer
    size = weights.key.shape[-1]
    moment = statistics.input_equal if whitened else torch.eye(size, dtype=torch.float64)
    name = "whitened_joint_svd" if whitened else "joint_svd"
    change = getattr(baselines, name)
    result = change(weights, statistics, *widths)
    for before, after, width in (
        (weights.key, result.key, widths[0]),
        (weights.value, result.value, widths[1]),
    ):
        assert torch.linalg.matrix_rank(after.flatten(0, 1)) == width
        error = (after - before).flatten(0, 1)
        expected = discarded(before, moment, width)
        torch.testing.assert_close((error @ moment @ error.mT).trace(), expected)


def squared_key_error(weights: AttentionWeights, key: Tensor, statistics: Any) -> float:
    """Σ_i tr(e_i S_i e_iᴴ) E|q_i|² over query heads and pairs, e_i = δ_i − M_i for k̂ = M k."""
    pairs, narrowed = (to_complex_pairs(k, 1) for k in (weights.key, key))
    total = 0.0
    for f in range(pairs.shape[1]):
        map_gg = narrowed[:, f] @ torch.linalg.pinv(pairs[:, f])
        error = torch.eye(len(map_gg), dtype=map_gg.dtype) - map_gg
        for i, energy in enumerate(statistics.head_query_energy[:, f].tolist()):
            row = error[i // weights.heads_per_group]
            total += energy * (row @ statistics.head_pair_covariance[i, f] @ row.conj()).real.item()
    return total


def test_attention_of_each_head_has_a_lower_error_under_it() -> None:
    bench = Bench("mha")
    for weights, statistics in zip(bench.weights, bench.statistics.layers, strict=True):
        plain, own = (
            squared_key_error(weights, change(weights, statistics, 16, 32).key, statistics)
            for change in (variants.closed_form, variants.attention_per_head)
        )
        assert 0 < own < 0.999 * plain


def test_a_constant_of_the_values_costs_no_cache() -> None:
    """Values of a constant and one direction need one number and a bias of the outputs."""
    bench = Bench(attention_bias=True)
    generator = torch.Generator().manual_seed(0)
    for attention in (layer.self_attn for layer in bench.model.model.layers):
        left, right = (torch.randn(n, generator=generator) for n in attention.v_proj.weight.shape)
        attention.v_proj.weight.data = left.outer(right) / 8
        attention.o_proj.bias.data.zero_()
    statistics = layer_statistics.collect(bench.source, random_blocks()).layers[0]
    weights = layer_statistics.layer_weights(bench.source)[0]

    def missed(result: AttentionWeights) -> Tensor:
        """Of the outputs for values alike in all heads, as a map of the inputs, [x, D + 1]."""
        error = (weights.value - result.value).repeat_interleave(weights.heads_per_group, 0)
        output = torch.einsum("xhd,hdi->xi", weights.output, error)
        if result.output_bias is not None:
            output[:, -1] -= result.output_bias
        return output

    scale = torch.einsum(
        "xhd,hdi->xi", weights.output, weights.value.repeat_interleave(weights.heads_per_group, 0)
    ).norm()
    assert missed(variants.value_constant(weights, statistics, FULL, 1)).norm() < 1e-3 * scale
    plain = replace(variants.closed_form(weights, statistics, FULL, 1), output_bias=None)
    assert missed(plain).norm() > 0.05 * scale


def test_values_that_keys_determine_need_no_features_of_their_own(layer) -> None:
    weights, statistics = layer
    generator = torch.Generator().manual_seed(0)
    of_keys = torch.randn(FULL, FULL, generator=generator, dtype=torch.float64)
    value = (of_keys @ weights.key.flatten(0, 1)).view_as(weights.value)
    shared, shared_features = replace(weights, value=value), variants.shared_features
    result = shared_features(shared, statistics, FULL // 2, FULL // 2)
    torch.testing.assert_close(result.key, weights.key)
    torch.testing.assert_close(result.value, value, rtol=1e-3, atol=1e-3)
    other = shared_features(weights, statistics, FULL // 2, FULL // 2)
    assert (other.value - weights.value).norm() > 0.1 * weights.value.norm()


# ------------------------------------------------------------------------------- pooled heads


def test_partitions_are_counted_by_stirling() -> None:
    partitions = baselines.partitions
    assert partitions(3, 2) == [[[0, 1], [2]], [[0, 2], [1]], [[0], [1, 2]]]
    for groups, count, number in ((4, 2, 7), (5, 3, 25), (4, 4, 1), (4, 1, 1)):
        found = partitions(groups, count)
        assert len(found) == number
        assert len({tuple(map(tuple, sets)) for sets in found}) == number
        assert all(sorted(chain(*sets)) == list(range(groups)) for sets in found)


@pytest.fixture(scope="module")
def four_heads() -> tuple[AttentionWeights, Any]:
    bench = Bench("mha")
    return bench.weights[0], bench.statistics.layers[0]


def test_equal_heads_are_pooled_without_loss(four_heads) -> None:
    weights, statistics = four_heads
    twins = replace(weights, key=weights.key[[0, 1, 0, 1]], value=weights.value[[0, 1, 1, 0]])
    mean_pooled = baselines.mean_pooled
    result = mean_pooled(twins, statistics, 16, 16)
    torch.testing.assert_close(result.key, twins.key)
    torch.testing.assert_close(result.value, twins.value)
    one = mean_pooled(weights, statistics, 8, 8)
    torch.testing.assert_close(one.key, weights.key.mean(0).expand_as(weights.key))
    torch.testing.assert_close(one.value, weights.value.mean(0).expand_as(weights.value))


def test_turned_heads_are_aligned_without_loss(four_heads) -> None:
    """Phases of rotary pairs and orthogonal maps of values, which attention cannot see."""
    weights, statistics = four_heads
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(2, 4, 1, generator=generator, dtype=torch.float64)
    phase = torch.polar(torch.ones_like(angles), 2 * angles)
    keys = to_half_split(to_complex_pairs(weights.key[:2], 1) * phase, 1)
    square = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    values = torch.linalg.qr(square)[0] @ weights.value[:2]
    turned = replace(
        weights,
        key=torch.cat((weights.key[:2], keys)),
        value=torch.cat((weights.value[:2], values)),
    )
    aligned = baselines.aligned_pooled(turned, statistics, 16, 16, rounds=200)
    for name in ("key", "value"):
        expected = getattr(turned, name)
        error = (getattr(aligned, name) - expected).norm() / expected.norm()
        averaged = getattr(baselines.mean_pooled(turned, statistics, 16, 16), name)
        assert error < 1e-2
        assert (averaged - expected).norm() / expected.norm() > 0.1


def test_the_same_weights_make_the_same_model(bench) -> None:
    same = baselines.model_with(bench.model, bench.weights)
    assert same is not bench.model
    assert difference(same, bench.model) < 1e-5
    bias = torch.ones(32, dtype=torch.float64)
    layers = [replace(weights, output_bias=bias) for weights in bench.weights]
    assert difference(baselines.model_with(bench.model, layers), bench.model) > 0.1


# ------------------------------------------------------------------------------- folding


def test_neighbours_that_rotate_alike_are_folded() -> None:
    folded_groups = variants.folded_groups
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])
    assert folded_groups(frequencies, 0.0) == [[3], [2], [1], [0]]
    assert folded_groups(frequencies, 0.01) == [[3, 2], [1], [0]]
    assert folded_groups(frequencies, 0.1) == [[3, 2, 1], [0]]
    # the slowest of a group decides, so a chain of near neighbours does not grow without end
    assert folded_groups(torch.tensor([0.3, 0.2, 0.1]), 0.15) == [[2, 1], [0]]


# ------------------------------------------------------------------------------- statistics


def test_statistics_are_sums_over_the_models_own_attention() -> None:
    model = make_tiny_llama("gqa", seed=4)
    collect = layer_statistics.collect
    collected = collect(source_of(model), BLOCKS, query_stride=1).layers
    for statistics, seen in zip(collected, observe(model), strict=True):
        ones = torch.ones(*seen.inputs.shape[:2], 1, dtype=torch.float64)
        x = torch.cat((seen.inputs, ones), dim=-1)
        tokens, heads = BLOCKS.numel(), seen.attention.shape[1]
        equal = torch.einsum("nti,ntj->ij", x, x) / tokens
        attended = seen.attention.mean(1).sum(1)  # [N, t]: what queries together give a token
        weighted = torch.einsum("nt,nti,ntj->ij", attended, x, x) / tokens
        key = torch.complex(*seen.key.chunk(2, -1))
        query = torch.complex(*seen.query.chunk(2, -1))
        energy = query.abs().square().sum((0, 2)) / tokens
        covariance = []
        for i in range(heads):
            p = seen.attention[:, i].to(key.dtype)  # [N, s, t]
            second = torch.einsum("nst,ngtf,nhtf->fgh", p, key, key.conj())
            mean = torch.einsum("nst,ngtf->ngsf", p, key)
            covariance.append(second - torch.einsum("ngsf,nhsf->fgh", mean, mean.conj()))
        for name, expected in (
            ("input_equal", equal),
            ("input_weighted", weighted),
            ("head_query_energy", energy),
            ("head_pair_covariance", torch.stack(covariance) / tokens),
        ):
            found = getattr(statistics, name)
            torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-5)
        # every head mixes all values, whichever group it belongs to
        every = torch.einsum("nhst,ngtd->gd", seen.attention, seen.value) / (tokens * heads)
        torch.testing.assert_close(
            statistics.value_mean, every.flatten().to(statistics.value_mean), rtol=1e-4, atol=1e-5
        )


def test_moments_of_the_package_are_left_as_they_are(bench) -> None:
    plain = tiny_moments(bench.model)
    for name in (field.name for field in fields(LayerMoments)):
        found, expected = (getattr(m.layers[0], name) for m in (bench.statistics, plain))
        torch.testing.assert_close(found, expected)
    assert type(plain.layers[0]) is LayerMoments  # what is collected beside them is not
