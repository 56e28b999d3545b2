"""Transforms are exact; energies are what errors cost; values are predicted as well as can be."""

import pytest
import torch

from tests.test_coding_decisions import expected_loss, layout_of
from tpa_convert.coding import (
    allocate_bits,
    coded_order,
    component_energies,
    design_quantiser,
    fisher_metric,
    groups_of_bits,
    pair_blocks,
    part_of,
    predict_values,
    principal_components,
    remaining_error,
    share_bytes,
)
from tpa_convert.modeling import RowLayout
from tpa_convert.modeling.tpa_codes import decode, encode


def positive_definite(n: int, seed: int, decay: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return (basis * torch.exp(-decay * torch.arange(n))) @ basis.mT


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
    covariance, metric = positive_definite(64, 3), positive_definite(64, 4)
    errors = []
    for blocks in (1, 4, 16):
        part = part_of(covariance, metric, pair_blocks(2, 32, blocks))
        assert part.blocks == [64 // blocks] * blocks
        energy = torch.cat(part.energies)
        errors.append(remaining_error(energy, allocate_bits(energy, 128)).item())
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_energies_are_those_of_the_components(blocks):
    covariance, metric = positive_definite(32, 0), positive_definite(32, 1)
    in_blocks = pair_blocks(2, 16, blocks)
    energies = component_energies(covariance, metric, in_blocks)
    part = part_of(covariance, metric, in_blocks)
    torch.testing.assert_close(energies, part.energies)
    wrong = part_of(covariance, torch.eye(32).double(), in_blocks)  # negative control
    assert not torch.allclose(torch.cat(energies), torch.cat(wrong.energies))


def test_where_no_error_costs_anything_components_are_finite():
    nothing = torch.zeros(16, 16, dtype=torch.float64)
    for covariance in (positive_definite(16, 0), nothing):
        found = principal_components(covariance, nothing, pair_blocks(2, 8, 2))
        assert all(part.isfinite().all() for part in found)


def gradients(size: torch.Tensor) -> torch.Tensor:
    """500 gradients by numbers of these sizes: the smaller a number, the larger its gradient."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(500, len(size), generator=generator, dtype=torch.float64) / size


def test_the_metric_of_few_tokens_is_shrunk_to_the_identity():
    gradient = gradients(torch.ones(6)) * torch.tensor([3.0, 1, 1, 1, 1, 0])
    moment = gradient.mT @ gradient / 500
    metrics = [fisher_metric(moment, tokens) for tokens in (1, 500, 10**9)]
    for metric in metrics:
        torch.testing.assert_close(metric.trace(), moment.trace())
    assert metrics[0][5, 5] > metrics[1][5, 5] > metrics[2][5, 5] > 0 == moment[5, 5]
    torch.testing.assert_close(metrics[2], moment, atol=1e-6, rtol=0)
    assert (metrics[0] - moment).abs().max() > 1  # negative control: few tokens say little


def test_what_numbers_are_multiplied_with_does_not_matter_to_their_energies():
    """Keys behind a norm whose weights are next to zero in places are next to zero there, with
    gradients as much larger: what is found must be what it is without these weights."""
    size = torch.tensor([1.0, 1e-4, 1, 1e-2, 1, 1, 1, -1]).double()
    covariance, found = positive_definite(8, 0), []
    for scale in (torch.ones(8).double(), size):
        gradient, scaled = gradients(scale), scale.outer(scale) * covariance
        moment = gradient.mT @ gradient / 500
        found.append(component_energies(scaled, fisher_metric(moment, 100, scale))[0])
    torch.testing.assert_close(*found)
    without = component_energies(scaled, fisher_metric(moment, 100))[0]  # negative control
    assert without.sum() > 1e4 * found[0].sum()


# ------------------------------------------------------------------------------- design


def samples(covariance: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(covariance)
    return torch.randn(count, len(root), generator=generator, dtype=torch.float64) @ root.mT


@pytest.mark.parametrize("blocks", [1, 2])
def test_designed_quantisers_leave_the_error_that_was_planned(blocks):
    covariance, metric = positive_definite(64, 8), positive_definite(64, 9)
    part = part_of(covariance, metric, pair_blocks(2, 32, blocks))
    x = samples(covariance, 4000)
    sink = torch.zeros(4000, dtype=torch.bool)
    sink[::100] = True
    x[sink] = 30 + 0.01 * x[sink]
    sink_mean = torch.full((64,), 30.0, dtype=torch.float64)
    for total, align in ((20, 2), (36, 16)):
        (bits,) = share_bytes([part.energies], total, align)
        groups = [groups_of_bits(block)[0] for block in bits]
        order = coded_order(part, groups)
        q = design_quantiser(part, sink_mean, order, layout_of(bits, align))
        rows = encode((x @ part.components.feature[order].mT).float(), q)
        assert rows.shape == (4000, q.layout.row_bytes)
        kept, label = decode(rows, q)
        assert torch.equal(label.bool(), sink)
        numbers = kept.double() @ part.components.gauge[:, order].mT
        error = numbers + torch.where(sink[:, None], sink_mean, 0) - x
        if blocks == 2:  # costs between blocks do not count
            outside = torch.ones(64, 64, dtype=torch.bool)
            for index in pair_blocks(2, 32, 2):
                outside[index[:, None], index] = False
            metric = metric.masked_fill(outside, 0)
        cost = torch.einsum("tn,nm,tm->t", error, metric, error)
        planned = expected_loss([part.energies], [bits])
        assert 0.7 * planned < cost[~sink].mean() < 1.1 * planned
        assert cost[sink].mean() < 0.01 * planned
        # negative control: components in another order have the wrong steps
        wrong = q._replace(step=q.step.flip(0), spread=q.spread.flip(0))
        again = encode((x @ part.components.feature[order].mT).float(), wrong)
        numbers = decode(again, wrong)[0].double() @ part.components.gauge[:, order].mT
        error = (numbers - x)[~sink]
        assert torch.einsum("tn,nm,tm->t", error, metric, error).mean() > 1.2 * planned


# ------------------------------------------------------------------------------- prediction


def test_prediction_is_that_of_sampled_codes():
    """The closed form against the moments of components that were coded and read again."""
    covariance = positive_definite(48, 5, decay=0.15)
    n = 24
    part = part_of(covariance[:n, :n], positive_definite(n, 6))
    bits = torch.tensor([4] * 3 + [3] * 5 + [2] * 6 + [1] * 4)
    groups = [[(4, 3), (3, 5), (2, 6), (1, 4)]]
    order = coded_order(part, groups)
    found = predict_values(part, order, bits, covariance, ridge=0.0)

    x = samples(covariance, 60_000)
    q = design_quantiser(part, torch.zeros(n).double(), order, RowLayout(tuple(groups[0])))
    components = (x[:, :n] @ part.components.feature[order].mT).float()
    # with a scale of one for all, which the closed form is about
    u = components / q.step + q.reach
    codes = torch.minimum(u.round().clamp_min(0), 2 * q.reach)
    decoded = ((codes - q.reach) * q.step).double()
    residual = x[:, n:] - decoded @ found.weight.mT
    sampled = residual.mT @ residual / len(x)
    scale = covariance[n:, n:].diagonal().mean()
    torch.testing.assert_close(sampled / scale, found.residual / scale, atol=0.03, rtol=0)
    # least squares on the samples explains hardly more
    best = torch.linalg.lstsq(decoded, x[:, n:]).solution
    least = (x[:, n:] - decoded @ best).square().sum(1).mean()
    assert residual.square().sum(1).mean() < 1.01 * least
    assert found.residual.trace() == pytest.approx(least.item(), rel=0.03)
    # negative control: without a prediction it is more; with other bits, a worse one is expected
    assert found.residual.trace() < 0.9 * covariance[n:, n:].trace()
    other = predict_values(part, order, torch.ones_like(bits), covariance, ridge=0.0)
    assert other.residual.trace() > 1.05 * least


def test_values_that_keys_say_nothing_of_are_left_as_they_are():
    covariance = torch.block_diag(positive_definite(16, 1), positive_definite(16, 2))
    part = part_of(covariance[:16, :16], torch.eye(16).double())
    groups = [[(2, 8)]]
    order = coded_order(part, groups)
    found = predict_values(part, order, torch.full((8,), 2), covariance)
    assert found.weight.abs().max() < 1e-9
    torch.testing.assert_close(found.residual, covariance[16:, 16:])
    covariance[:16, 16:] = 0.5 * positive_definite(16, 3)  # negative control: now they say some
    covariance[16:, :16] = covariance[:16, 16:].mT
    assert predict_values(part, order, torch.full((8,), 2), covariance).weight.abs().max() > 1e-3
