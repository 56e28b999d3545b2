"""Bits go where they take most error away; transforms are exact; energies are what errors cost."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_convert.coding import (
    allocate_bits,
    class_means,
    class_offset,
    decode,
    design_quantiser,
    encode,
    fisher_metric,
    fit_row,
    importance_and_variance,
    key_metric,
    pair_blocks,
    prediction,
    principal_components,
    rotated_covariance,
    rotated_gauge,
    rotation_invariant,
    row_layout,
    share_rows,
    spreads,
    weighted_covariance,
)
from tpa_convert.coding.allocation import GAUSSIAN_ERROR, GAUSSIAN_STEP, envelope, remaining_error
from tpa_convert.decomposition.gauge import decompose_keys, decompose_values, value_metric
from tpa_convert.decomposition.latent import decompose_latent_keys, latent_components
from tpa_convert.decomposition.moments import data_free_moments
from tpa_convert.modeling.tpa_codes import tier_bits_of

LEVEL_SETS = ((0, 1, 2, 3, 4, 8), (0, 1, 2, 4, 8), (0, 2, 4, 8), (0, 4), (0, 1))
energies = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=4).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def positive_definite(n: int, seed: int, decay: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return (basis * torch.exp(-decay * torch.arange(n))) @ basis.mT


# ------------------------------------------------------------------------------- allocation


def test_table_of_the_gaussian():
    """Steps and errors by integrating: no step nearby is better, and the error is as listed."""
    x = torch.linspace(-12, 12, 480_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    density /= density.sum()

    def error(bits: int, step: float) -> float:
        reach = (2**bits - 1) / 2
        code = (x / step + reach).round().clamp(0, 2 * reach) - reach
        return ((x - code * step).square() * density).sum().item()

    for bits in range(1, 9):
        step = GAUSSIAN_STEP[bits]
        assert error(bits, step) == pytest.approx(GAUSSIAN_ERROR[bits], rel=0.01)
        assert error(bits, step) <= min(error(bits, 0.97 * step), error(bits, 1.03 * step))


@settings(deadline=None, max_examples=50)
@given(energies, st.sampled_from(LEVEL_SETS), st.integers(0, 40))
def test_no_allocation_of_as_many_bits_is_better(energy, levels, budget):
    bits = allocate_bits(energy, budget, levels)
    used = int(bits.sum())
    assert used <= budget
    assert set(bits.tolist()) <= set(levels)
    least = min(
        (energy * energy.new_tensor([GAUSSIAN_ERROR[b] for b in other])).sum().item()
        for other in itertools.product(levels, repeat=len(energy))
        if sum(other) <= used
    )
    assert remaining_error(energy, bits).item() == pytest.approx(least, rel=1e-9)


def test_greedy_fills_the_budget():
    energy = torch.logspace(0, -4, 100)
    bits = allocate_bits(energy, 200, tuple(range(9)))
    assert bits.sum() == 200
    assert (bits.diff() <= 0).all()  # more energy, more bits
    assert remaining_error(energy, bits) < 0.3 * remaining_error(energy, torch.full_like(bits, 2))


def test_envelope_skips_levels_that_do_not_pay():
    assert envelope([0, 1, 2, 4]) == [(0, 1), (1, 2), (2, 4)]
    assert envelope([0]) == []


@pytest.mark.parametrize("levels", [(1, 2), (0, 9), (-1, 0)])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(ValueError, match="levels"):
        allocate_bits(torch.ones(3), 5, levels)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 100), st.integers(2, 120), st.sampled_from((1, 2, 4, 16)),
    st.sampled_from(LEVEL_SETS), st.integers(0, 1000),
)  # fmt: skip
def test_rows_fit_and_the_strongest_get_most(count, size, align, levels, seed):
    energy = torch.rand(count, generator=torch.Generator().manual_seed(seed)).double() ** 8
    bits = fit_row(energy, size, align, levels)
    layout, order = row_layout(bits, align)
    assert layout.row_bytes <= size
    assert torch.equal(bits[order], torch.tensor(layout.bits, dtype=torch.long))
    assert (bits[energy.argsort(descending=True)].diff() <= 0).all()


@settings(deadline=None, max_examples=25)
@given(energies, st.integers(2, 9), st.sampled_from((1, 2)), st.sampled_from(LEVEL_SETS))
def test_no_row_of_as_many_bytes_is_better(energy, size, align, levels):
    least = min(
        remaining_error(energy, torch.tensor(bits)).item()
        for bits in itertools.product(levels, repeat=len(energy))
        if row_layout(torch.tensor(bits), align)[0].row_bytes <= size
        and whole_tiers(torch.tensor(bits), align)
    )
    assert remaining_error(energy, fit_row(energy, size, align, levels)).item() <= least * 1.000001


def whole_tiers(bits: torch.Tensor, align: int) -> bool:
    """Whether the row would have as many bytes with all its tiers filled up."""
    layout, _ = row_layout(bits, align)
    full = [(b, -(-n * min(tier_bits_of(b)) // (8 * align))) for b, n in layout.groups]
    filled = [(b, n * 8 * align // min(tier_bits_of(b))) for b, n in full]
    return layout._replace(groups=tuple(filled)).row_bytes == layout.row_bytes


def test_padding_costs_little_in_wide_rows():
    energy = torch.logspace(0, -5, 1024, dtype=torch.float64)
    free = remaining_error(energy, allocate_bits(energy, 8 * 256))
    assert remaining_error(energy, fit_row(energy, 258, align=16)) < 1.1 * free


def test_a_row_needs_its_header():
    with pytest.raises(ValueError, match="header"):
        fit_row(torch.ones(3), 1)
    with pytest.raises(ValueError, match="headers"):
        share_rows([torch.ones(3), torch.ones(3)], 3)


def test_one_budget_goes_to_the_part_that_needs_it():
    energy = torch.logspace(0, -3, 64)
    loud, quiet = share_rows([10 * energy, energy], 40)
    sizes = [row_layout(bits, 2)[0].row_bytes for bits in (loud, quiet)]
    assert sum(sizes) <= 40
    assert sum(sizes) > 32
    assert sizes[0] > sizes[1]
    alike = share_rows([energy, energy], 40)
    assert torch.equal(*alike)


# ------------------------------------------------------------------------------- components


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_components_are_exact_and_orthogonal_in_the_metric(blocks):
    covariance, metric = positive_definite(32, 0), positive_definite(32, 1)
    found = principal_components(covariance, metric, pair_blocks(2, 16, blocks))
    identity = torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(found.gauge @ found.feature, identity)
    torch.testing.assert_close(found.gauge.norm(dim=0), torch.ones(32, dtype=torch.float64))
    gram = found.gauge.mT @ metric @ found.gauge
    torch.testing.assert_close(gram.diagonal(), found.importance)
    if blocks == 1:
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-10, rtol=0)
        variance = found.feature @ covariance @ found.feature.mT
        torch.testing.assert_close(variance, variance.diagonal().diag(), atol=1e-10, rtol=0)
        energy = found.importance * variance.diagonal()
        torch.testing.assert_close(energy, torch.linalg.eigvals(metric @ covariance).real.sort(descending=True).values)  # noqa: E501  # fmt: skip


def test_blocks_of_pairs_keep_both_halves_of_all_heads():
    blocks = pair_blocks(3, 8, 2)
    assert blocks[0].tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21]
    assert sorted(torch.cat(blocks).tolist()) == list(range(24))
    with pytest.raises(ValueError, match="rotary pairs"):
        pair_blocks(3, 8, 3)


def test_wider_blocks_leave_less_energy_to_many_components():
    covariance, metric = positive_definite(64, 3), key_metric(torch.rand(2, 16).double() + 0.1)
    errors = []
    for blocks in (1, 4, 16):
        found = principal_components(covariance, metric, pair_blocks(2, 32, blocks))
        energy = found.importance * (found.feature @ covariance @ found.feature.mT).diagonal()
        errors.append(remaining_error(energy, allocate_bits(energy, 128)).item())
    assert errors[0] < errors[1] < errors[2]


def test_rotated_components_commute_with_rotation():
    head_dim, pairs = 8, 4
    covariance = rotation_invariant(positive_definite(16, 5), head_dim)
    metric = rotation_invariant(positive_definite(16, 6), head_dim)
    angle = torch.rand(pairs, dtype=torch.float64) * 6
    rotation = torch.zeros(16, 16, dtype=torch.float64)
    for j, f in itertools.product(range(2), range(pairs)):
        a, b = j * head_dim + f, j * head_dim + pairs + f
        rotation[a, a] = rotation[b, b] = angle[f].cos()
        rotation[b, a], rotation[a, b] = angle[f].sin(), -angle[f].sin()
    found = principal_components(covariance, metric, pair_blocks(2, head_dim, pairs))
    for matrix in (covariance, metric):  # inside pairs, rotations change neither
        turned = rotation @ matrix @ rotation.mT
        for index in pair_blocks(2, head_dim, pairs):
            torch.testing.assert_close(turned[index][:, index], matrix[index][:, index])
    # both components of one complex one: dropping them leaves a projection that commutes
    kept = [0, 1, 4, 5]
    projection = found.gauge[:, kept] @ found.feature[kept]
    torch.testing.assert_close(projection @ rotation, rotation @ projection, atol=1e-9, rtol=0)
    half = found.gauge[:, [0]] @ found.feature[[0]]  # negative control: half a complex component
    assert (half @ rotation - rotation @ half).abs().max() > 1e-3


def test_metrics_and_weights():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(500, 6, generator=generator) * torch.tensor([3.0, 1, 1, 1, 1, 0])
    metric = fisher_metric(gradient, torch.eye(6), 0.0)
    torch.testing.assert_close(metric, gradient.double().mT @ gradient.double() / 500)
    shrunk = fisher_metric(gradient, torch.eye(6), 0.1)
    assert shrunk[5, 5] > 0
    torch.testing.assert_close(shrunk.trace(), metric.trace())
    value = torch.randn(500, 6, generator=generator)
    mean, covariance = weighted_covariance(value, gradient, shrunk)
    # a token without a gradient costs nothing, whatever it is
    value[0], gradient[0] = 1e6, 0.0
    again = weighted_covariance(value, gradient, shrunk)
    assert (again[0] - mean).abs().max() < 0.1
    assert (again[1] - covariance).abs().max() < 0.2


@pytest.fixture(scope="module")
def layer():
    from tpa_convert.decomposition import AttentionWeights

    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (4, 8, 13), "key": (2, 8, 13), "value": (2, 8, 13), "output": (12, 4, 8)}
    weights = AttentionWeights(
        **{k: torch.randn(*s, generator=generator).double() for k, s in shapes.items()},
        output_bias=None,
        scale=1.0,
    )
    return weights, data_free_moments(weights)


def test_energies_of_the_decompositions_are_their_eigenvalues(layer):
    """ι σ² of the factors of rotated keys, latent keys and values: what truncation costs."""
    weights, moments = layer
    keys = decompose_keys(weights, moments, 16)
    gauge = rotated_gauge(keys.gauge, keys.rotary_pair, 4)
    covariance = rotated_covariance(moments.pair_covariance)
    importance, variance = importance_and_variance(
        gauge, key_metric(moments.query_energy), covariance
    )
    w = moments.query_energy.sqrt().mT
    hermitian = moments.pair_covariance * w[:, :, None] * w[:, None, :]
    expected = torch.linalg.eigvalsh(hermitian).flatten().sort().values
    energy = importance * variance
    torch.testing.assert_close((energy[:8] + energy[8:]).sort().values, expected)

    latent = decompose_latent_keys(weights, moments, 16)
    importance, variance = importance_and_variance(
        latent.gauge.flatten(0, 1), key_metric(moments.query_energy), moments.key_covariance
    )
    expected = latent_components(moments)[0].flip(0)
    torch.testing.assert_close(importance * variance, expected, atol=1e-9, rtol=1e-6)

    metric = value_metric(weights)
    values = decompose_values(weights, moments, 16, metric)
    gauge, dense = values.gauge.flatten(0, 1), torch.block_diag(*metric)
    importance, variance = importance_and_variance(gauge, dense, moments.value_covariance)
    total = (dense @ moments.value_covariance).trace()
    torch.testing.assert_close((importance * variance).sum(), total)
    scaled = importance_and_variance(2 * gauge, dense, moments.value_covariance)
    torch.testing.assert_close(scaled[0] * scaled[1], importance * variance)


# ------------------------------------------------------------------------------- design


def test_designed_quantisers_leave_the_error_that_was_planned():
    generator = torch.Generator().manual_seed(0)
    covariance, metric = positive_definite(64, 8), positive_definite(64, 9)
    found = principal_components(covariance, metric)
    root = torch.linalg.cholesky(covariance)
    x = torch.randn(4000, 64, generator=generator, dtype=torch.float64) @ root.mT
    sink = torch.zeros(4000, dtype=torch.bool)
    sink[::100] = True
    x[sink] = 30 + 0.01 * x[sink]
    samples = x @ found.feature.mT
    mean = class_means(samples, sink)
    spread = spreads(samples, mean, found.importance)
    energy = found.importance * spread.square()
    for size, align in ((20, 2), (36, 16)):
        bits = fit_row(energy, size, align)
        q, order = design_quantiser(spread, mean, found.importance, bits, align)
        rows = encode(samples[:, order].float(), q)
        assert rows.shape == (4000, q.layout.row_bytes)
        kept, label = decode(rows, q)
        assert torch.equal(label.bool(), sink)
        numbers = kept.double() @ found.gauge[:, order].mT
        numbers = numbers + class_offset(found.gauge, mean, order)[label]
        error = numbers - x
        cost = torch.einsum("tn,nm,tm->t", error, metric, error)
        planned = remaining_error(energy, bits).item()
        assert 0.7 * planned < cost[~sink].mean() < 1.1 * planned
        assert cost[sink].mean() < 0.01 * planned


def test_prediction_finds_what_the_parent_says_of_the_child():
    generator = torch.Generator().manual_seed(0)
    parent = torch.randn(3000, 6, generator=generator) * torch.logspace(0, -1, 6) + 5
    weight = torch.randn(6, 4, generator=generator)
    noise = torch.randn(3000, 4, generator=generator)
    child = parent @ weight + 0.1 * noise - 3
    found = prediction(parent, child, ridge=1e-6)
    torch.testing.assert_close(found, weight.double(), atol=0.05, rtol=0)
    residual = child - parent @ found.float()
    assert residual.var(0).max() < 0.02
    # negative control: nothing is predicted of independent numbers
    assert (parent @ prediction(parent, noise).float()).var(0).max() < 0.02
