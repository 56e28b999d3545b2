"""Decompositions against what they claim: errors are measured on samples, not read off the code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpa_convert.decomposition import (
    METHODS,
    AttentionWeights,
    DataFreeMoments,
    KeyFactors,
    LayerMoments,
    ValueFactors,
    decompose_latent_keys,
)
from tpa_convert.decomposition.factors import (
    symmetric_power,
    to_complex_pairs,
    to_half_split,
    with_unit_gauge,
)
from tpa_convert.decomposition.gauge import allocate_components, value_metric
from tpa_convert.decomposition.moments import constant_functional
from tpa_convert.decomposition.tensor import cp_factors, head_svd, whiten

# TensorLy warns of a CP with more components than a mode has entries, which is meant here.
pytestmark = pytest.mark.filterwarnings("error:Trying to compute SVD:UserWarning")

EXACT = 1e-9  # relative, float64


class Layer(NamedTuple):
    """A random layer, inputs [n, D + 1] to judge it on, and the moments of exactly these inputs."""

    weights: AttentionWeights
    inputs: Tensor
    moments: LayerMoments

    @property
    def keys(self) -> Tensor:
        """Complex keys [n, g, f]."""
        return to_complex_pairs(torch.einsum("nx,gdx->ngd", self.inputs, self.weights.key), -1)

    @property
    def values(self) -> Tensor:
        """Values [n, g, d]."""
        return torch.einsum("nx,gdx->ngd", self.inputs, self.weights.value)

    def key_error(self, approximation: Tensor) -> Tensor:
        """E Σ_{j,f} w² |k − k̂|² of complex keys [n, g, f]."""
        error = (self.keys - approximation).abs().square().mean(0)
        return (self.moments.query_energy * error).sum()

    def value_error(self, approximation: Tensor) -> Tensor:
        """E Σ_i ‖O_i (v_{j(i)} − v̂_{j(i)})‖² of values [n, g, d]."""
        error = (self.values - approximation).repeat_interleave(self.weights.heads_per_group, 1)
        output = torch.einsum("xhd,nhd->nhx", self.weights.output, error)
        return output.square().sum((1, 2)).mean()


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_layer(
    groups: int = 3, heads_per_group: int = 2, head_dim: int = 8, hidden: int = 20, seed: int = 0
) -> Layer:
    """Inputs are correlated, query energies differ by head and pair: a forgotten weight shows."""
    heads = groups * heads_per_group
    weights = AttentionWeights(
        query=normal(heads, head_dim, hidden + 1, seed=seed),
        key=normal(groups, head_dim, hidden + 1, seed=seed + 1),
        value=normal(groups, head_dim, hidden + 1, seed=seed + 2),
        output=normal(hidden, heads, head_dim, seed=seed + 3),
        output_bias=None,
        scale=head_dim**-0.5,
    )
    inputs = normal(400, hidden, seed=seed + 4) @ normal(hidden, hidden, seed=seed + 5)
    inputs = torch.cat((inputs + 1, torch.ones(400, 1, dtype=torch.float64)), dim=1)
    key = torch.einsum("nx,gdx->ngd", inputs, weights.key)
    pairs = to_complex_pairs(key, -1)
    value = torch.einsum("nx,gdx->ngd", inputs, weights.value).flatten(1)
    moments = LayerMoments(
        pair_covariance=torch.einsum("ngf,nhf->fgh", pairs, pairs.conj()) / len(inputs),
        query_energy=normal(groups, head_dim // 2, seed=seed + 6).square() + 0.1,
        key_covariance=key.flatten(1).mT @ key.flatten(1) / len(inputs),
        key_mean=key.flatten(1).mean(0),
        value_covariance=value.mT @ value / len(inputs),
        constant_functional=torch.zeros(hidden, dtype=torch.float64),
        constant_residual=torch.ones((), dtype=torch.float64),
    )
    return Layer(weights, inputs, moments)


def keys_of(factors: KeyFactors, layer: Layer) -> Tensor:
    """k̂ = Σ_p T_p b_p on the layer's inputs, [n, g, f]."""
    feature = layer.inputs.to(factors.feature.dtype) @ factors.feature.mT
    components = feature[:, None] * factors.gauge
    return torch.zeros_like(layer.keys).index_add(2, factors.rotary_pair, components)


def values_of(factors: ValueFactors, layer: Layer) -> Tensor:
    """v̂ = U b on the layer's inputs, [n, g, d]."""
    return torch.einsum("gdw,nw->ngd", factors.gauge, layer.inputs @ factors.feature.mT)


def decompose_keys(method: str, layer: Layer, width: int, rank: int | None = None) -> KeyFactors:
    return METHODS[method].decompose_keys(layer.weights, layer.moments, width, rank)


def decompose_values(method: str, layer: Layer, width: int) -> ValueFactors:
    metric = value_metric(layer.weights)
    return METHODS[method].decompose_values(layer.weights, layer.moments, width, metric)


@pytest.fixture(scope="module")
def layer() -> Layer:
    return random_layer()


# Keys in a gauge


@pytest.mark.parametrize("width", [2, 8, 14, 24])
def test_key_error_is_the_sum_of_the_discarded_eigenvalues(layer, width) -> None:
    weighted = layer.keys * layer.moments.query_energy.sqrt()
    covariance = torch.einsum("ngf,nhf->fgh", weighted, weighted.conj()) / len(weighted)
    eigenvalues = torch.linalg.eigvalsh(covariance).flatten().sort().values
    error = layer.key_error(keys_of(decompose_keys("gauge", layer, width), layer))
    expected = eigenvalues[: len(eigenvalues) - width // 2].sum()
    torch.testing.assert_close(error, expected, rtol=EXACT, atol=EXACT * eigenvalues.sum())


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0], ids=["near", "far", "elsewhere"])
def test_no_random_subspace_of_the_same_size_has_a_lower_key_error(layer, scale) -> None:
    factors = decompose_keys("gauge", layer, 12)
    best = layer.key_error(keys_of(factors, layer))
    weight = layer.moments.query_energy.sqrt()
    for trial in range(30):
        approximation = torch.zeros_like(layer.keys)
        for f in factors.rotary_pair.unique():
            chosen = factors.gauge[:, factors.rotary_pair == f] * weight[:, f, None]
            noise = torch.complex(*normal(2, *chosen.shape, seed=100 * trial + int(f)))
            basis, _ = torch.linalg.qr(chosen + scale * noise)
            projected = (layer.keys[..., f] * weight[:, f]) @ (basis @ basis.mH).mT
            approximation[..., f] = projected / weight[:, f]
        assert layer.key_error(approximation) > best


def test_a_rank_limit_holds_on_every_pair(layer) -> None:
    factors = decompose_keys("gauge", layer, 8, rank=1)
    assert factors.rotary_pair.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["tucker", "cp"])
@pytest.mark.parametrize("width", [4, 12, 18])
def test_no_other_method_has_a_lower_key_error(layer, method, width) -> None:
    """Real head factors are among the complex ones; whole heads (svd) are tested below."""
    gauge, other = (
        layer.key_error(keys_of(decompose_keys(name, layer, width), layer))
        for name in ("gauge", method)
    )
    assert gauge <= other * (1 + EXACT)


def test_whole_heads_have_a_higher_key_error(layer) -> None:
    gauge, svd = (
        layer.key_error(keys_of(decompose_keys(name, layer, 16), layer))
        for name in ("gauge", "svd")
    )
    assert gauge < svd


# Latent keys


@pytest.mark.parametrize("width", [1, 7, 24])
def test_latent_key_error_is_the_sum_of_the_discarded_eigenvalues(layer, width) -> None:
    key = torch.einsum("nx,gdx->ngd", layer.inputs, layer.weights.key)
    covariance = torch.cov(key.flatten(1).mT, correction=0)
    moments = replace(layer.moments, key_covariance=covariance)
    factors = decompose_latent_keys(layer.weights, moments, width)
    rebuilt = torch.einsum("gdw,nw->ngd", factors.gauge, layer.inputs @ factors.feature.mT)
    energy = torch.cat((layer.moments.query_energy,) * 2, dim=1)  # both halves of a head
    error = (energy * (rebuilt + factors.offset - key).square().mean(0)).sum()
    weight = energy.flatten().sqrt()
    eigenvalues = torch.linalg.eigvalsh(weight[:, None] * covariance * weight)
    expected = eigenvalues[: len(eigenvalues) - width].sum()
    torch.testing.assert_close(error, expected, rtol=1e-8, atol=1e-8 * eigenvalues.sum())


# Values in a gauge


@pytest.mark.parametrize("width", [1, 5, 12, 24])
def test_value_error_is_the_sum_of_the_discarded_eigenvalues(layer, width) -> None:
    """In the metric of the output: the singular values of [O_1 v, …, O_h v] over the sample."""
    values = layer.values.repeat_interleave(layer.weights.heads_per_group, 1)
    outputs = torch.einsum("xhd,nhd->nhx", layer.weights.output, values).flatten(1)
    eigenvalues = torch.linalg.svdvals(outputs).square() / len(outputs)
    error = layer.value_error(values_of(decompose_values("gauge", layer, width), layer))
    expected = eigenvalues[width:].sum()
    torch.testing.assert_close(error, expected, rtol=EXACT, atol=EXACT * eigenvalues.sum())


def test_no_random_subspace_of_the_same_size_has_a_lower_value_error(layer) -> None:
    factors = decompose_values("gauge", layer, 6)
    best = layer.value_error(values_of(factors, layer))
    flat = layer.values.flatten(1)
    for trial in range(30):
        basis = factors.gauge.flatten(0, 1) + 0.05 * normal(24, 6, seed=trial)
        coefficients = torch.linalg.lstsq(basis, flat.mT).solution
        assert layer.value_error((basis @ coefficients).mT.unflatten(1, (3, 8))) > best


@pytest.mark.parametrize("method", ["svd", "tucker", "cp"])
def test_no_other_method_has_a_lower_value_error(layer, method) -> None:
    gauge, other = (
        layer.value_error(values_of(decompose_values(name, layer, 8), layer))
        for name in ("gauge", method)
    )
    assert gauge < other


# Tensor decompositions


@pytest.mark.parametrize("method", ["gauge", "svd", "tucker"])
def test_full_width_is_exact(layer, method) -> None:
    keys = keys_of(decompose_keys(method, layer, 24), layer)
    values = values_of(decompose_values(method, layer, 24), layer)
    torch.testing.assert_close(keys, layer.keys)
    torch.testing.assert_close(values, layer.values)


def test_a_unit_gauge_changes_no_key_and_no_value(layer) -> None:
    keys, values = decompose_keys("gauge", layer, 12), decompose_values("gauge", layer, 12)
    unit_keys, unit_values = with_unit_gauge(keys), with_unit_gauge(values)
    torch.testing.assert_close(keys_of(unit_keys, layer), keys_of(keys, layer))
    torch.testing.assert_close(values_of(unit_values, layer), values_of(values, layer))
    assert not torch.allclose(unit_values.gauge, values.gauge)
    for factors in (unit_keys, unit_values):
        norm = factors.gauge.abs().square().flatten(0, -2).sum(0)
        torch.testing.assert_close(norm, torch.ones_like(norm))


def test_a_component_without_a_gauge_stays_without_one() -> None:
    factors = with_unit_gauge(ValueFactors(normal(2, 5, seed=0), torch.zeros(3, 4, 2)))
    assert not factors.gauge.any()


@pytest.mark.parametrize("hidden", [10, 40], ids=["rank-deficient", "full rank"])
def test_whitening_keeps_the_norm_of_every_error(hidden) -> None:
    """‖A W̃‖² = E‖A W x‖² for every map A of the outputs, and un-whitening gives W back."""
    layer = random_layer(hidden=hidden)
    whitened, unwhiten = whiten(layer.weights.value, layer.moments.value_covariance)
    assert whitened.shape == (3, 8, min(24, hidden + 1))
    error = normal(5, 24, seed=9)
    expected = (layer.values.flatten(1) @ error.mT).square().sum(1).mean()
    torch.testing.assert_close((error @ whitened.flatten(0, 1)).square().sum(), expected)
    torch.testing.assert_close(whitened @ unwhiten, layer.weights.value)


@pytest.mark.parametrize("rank", [1, 2])
def test_head_svd_is_the_best_of_its_rank(layer, rank) -> None:
    """Eckart and Young over the heads, the rest of each value taken as one long vector."""
    head_factor, feature = head_svd(layer.weights.value, layer.moments.value_covariance, rank)
    approximation = torch.einsum("rg,rdx,nx->ngd", head_factor, feature, layer.inputs)
    error = (layer.values - approximation).square().sum((1, 2)).mean()
    heads = layer.values.transpose(0, 1).flatten(1)
    expected = torch.linalg.svdvals(heads)[rank:].square().sum() / len(layer.values)
    torch.testing.assert_close(error, expected)


def test_cp_error_falls_with_the_rank_and_finds_the_true_rank() -> None:
    factors = [normal(size, 4, seed=size) for size in (3, 8, 20)]
    tensor = torch.einsum("ar,br,cr->abc", *factors)
    errors = []
    for rank in (1, 2, 3, 4):
        found = cp_factors(tensor, rank, iterations=500)
        errors.append((tensor - torch.einsum("ar,br,cr->abc", *found)).norm() / tensor.norm())
    assert errors == sorted(errors, reverse=True)
    assert errors[2] > 0.05
    assert errors[3] < 1e-3


def test_cp_errors_of_keys_and_values_fall_with_the_width(layer) -> None:
    keys = [layer.key_error(keys_of(decompose_keys("cp", layer, w), layer)) for w in (4, 8, 16)]
    values = [
        layer.value_error(values_of(decompose_values("cp", layer, w), layer)) for w in (4, 8, 16)
    ]
    assert keys == sorted(keys, reverse=True)
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("method", list(METHODS))
def test_the_same_input_gives_the_same_factors(method) -> None:
    first, second = (
        (decompose_keys(method, layer, 16), decompose_values(method, layer, 16))
        for layer in (random_layer(seed=3), random_layer(seed=3))
    )
    assert torch.equal(first[0].feature, second[0].feature)
    assert torch.equal(first[0].gauge, second[0].gauge)
    assert torch.equal(first[1].feature, second[1].feature)
    assert torch.equal(first[1].gauge, second[1].gauge)


# Parts


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.integers(1, 6),
    groups=st.integers(1, 5),
    rank=st.none() | st.integers(1, 5),
    share=st.floats(0.01, 1),
    zeros=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_allocation_takes_the_strongest_components(pairs, groups, rank, share, zeros, seed) -> None:
    """No other choice that keeps to the rank has more energy; ties (dead pairs) break nothing."""
    energy = normal(pairs, groups, seed=seed).square()
    if zeros:
        energy[::2] = 0
    limit = groups if rank is None else min(rank, groups)
    rank = None if rank is None else limit
    count = max(1, int(share * pairs * limit))
    rotary_pair, component = allocate_components(energy, count, rank)
    assert len(rotary_pair) == len({*zip(rotary_pair.tolist(), component.tolist(), strict=True)})
    assert rotary_pair.tolist() == sorted(rotary_pair.tolist())
    assert rotary_pair.bincount().max() <= limit
    best = energy.sort(dim=1, descending=True).values[:, :limit].flatten().sort().values[-count:]
    torch.testing.assert_close(energy[rotary_pair, component].sum(), best.sum())


def test_symmetric_power_leaves_absent_directions_out() -> None:
    factor = normal(2, 6, 3, seed=0)
    matrix = factor @ factor.mT  # [2, 6, 6] of rank 3
    root, inverse_root = symmetric_power(matrix, 0.5), symmetric_power(matrix, -0.5)
    torch.testing.assert_close(root @ root, matrix)
    projector = inverse_root @ matrix @ inverse_root
    torch.testing.assert_close(projector @ projector, projector)
    torch.testing.assert_close(projector @ factor, factor)
    torch.testing.assert_close(torch.trace(projector[0]), torch.tensor(3.0, dtype=torch.float64))
    assert torch.equal(symmetric_power(0 * matrix, -0.5), 0 * matrix)


@pytest.mark.parametrize("mean", [0.0, 0.5, 10.0])
def test_constant_functional_is_the_least_squares_solution(mean) -> None:
    inputs = normal(300, 6, seed=1) @ normal(6, 6, seed=2) + mean
    ones = torch.ones(300, 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(inputs, ones).solution
    functional, residual = constant_functional(
        inputs.mT @ inputs / 300, inputs.mean(0), damping=0.0
    )
    torch.testing.assert_close(functional, expected[:, 0])
    torch.testing.assert_close(residual, (1 - inputs @ expected).square().mean())


def test_damping_makes_the_functional_of_few_inputs_finite() -> None:
    inputs = normal(4, 6, seed=1)
    functional, residual = constant_functional(inputs.mT @ inputs / 4, inputs.mean(0))
    assert functional.isfinite().all()
    assert 0 <= residual < 1e-3


def test_data_free_moments_are_those_of_white_inputs(layer) -> None:
    """Inputs whose second moment is the identity give the same covariances."""
    moments = DataFreeMoments(layer.weights)
    key = layer.weights.key
    white = to_complex_pairs(key, 1)
    for f in range(4):
        torch.testing.assert_close(moments.pair_covariance[f], white[:, f] @ white[:, f].mH)
    torch.testing.assert_close(moments.key_covariance, key.flatten(0, 1) @ key.flatten(0, 1).mT)
    value = layer.weights.value.flatten(0, 1)
    torch.testing.assert_close(moments.value_covariance, value @ value.mT)
    assert (moments.query_energy == 1).all()


def test_complex_pairs_are_halves_not_neighbours() -> None:
    x = torch.arange(8.0).view(2, 4)
    assert to_complex_pairs(x, 1).tolist() == [[0 + 2j, 1 + 3j], [4 + 6j, 5 + 7j]]
    assert torch.equal(to_half_split(to_complex_pairs(x, 1), 1), x)


# Memory


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made inside of this."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [one.nbytes for one in tree_leaves(made) if isinstance(one, Tensor)]
        self.nbytes = max(self.nbytes, *sizes, 0)
        return made


@pytest.mark.parametrize("latent", [False, True])
def test_nothing_is_larger_than_a_projection(latent: bool) -> None:
    """Also with as many key heads as query heads, where a copy of the keys for each component is
    half as many times a projection as there are heads."""
    heads, head_dim = 8, 4
    size = (heads, head_dim, heads * head_dim + 1)
    projections = [normal(*size, seed=seed) for seed in range(3)]
    output = normal(heads * head_dim, heads, head_dim, seed=3)
    weights = AttentionWeights(*projections, output, None, head_dim**-0.5)
    moments, width = DataFreeMoments(weights), heads * head_dim // 2
    decompose = decompose_latent_keys if latent else METHODS["gauge"].decompose_keys
    metric = value_metric(weights)
    with Largest() as largest:
        keys = decompose(weights, moments, width)
        METHODS["gauge"].decompose_values(weights, moments, width, metric)
    assert largest.nbytes <= weights.key.nbytes
    assert keys.feature.nbytes < weights.key.nbytes
    with Largest() as largest:  # negative control: heads side by side for each component
        weights.key[:, torch.zeros(width, dtype=torch.long)].clone()
    assert largest.nbytes > weights.key.nbytes
