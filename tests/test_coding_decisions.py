"""Bits go where they take most error away; transforms are exact; energies are what errors cost."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_convert.coding import (
    allocate_bits,
    coded_order,
    design_quantiser,
    fisher_metric,
    fit_tiers,
    groups_of_bits,
    least_row_bytes,
    pair_blocks,
    part_of,
    predict_values,
    principal_components,
    remaining_error,
    share_bytes,
)
from tpa_convert.coding.allocation import GAUSSIAN_ERROR, GAUSSIAN_STEP, envelope, share_units
from tpa_convert.modeling import RowLayout
from tpa_convert.modeling.tpa_codes import decode, encode, tier_bits_of

LEVEL_SETS = ((0, 1, 2, 3, 4, 8), (0, 1, 2, 4, 8), (0, 2, 4, 8), (0, 4), (0, 3), (0, 1))
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


def layout_of(blocks: list[torch.Tensor], align: int) -> RowLayout:
    """Of the row of a part with these bits in its blocks."""
    groups = [group for bits in blocks for group in groups_of_bits(bits)[0]]
    return RowLayout(tuple(groups), align)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 100), st.integers(0, 120), st.sampled_from((1, 2, 4, 16)),
    st.sampled_from(LEVEL_SETS), st.integers(0, 1000),
)  # fmt: skip
def test_tiers_fit_and_the_strongest_get_most(count, size, align, levels, seed):
    energy = torch.rand(count, generator=torch.Generator().manual_seed(seed)).double() ** 8
    bits = fit_tiers(energy, size, align, levels)
    layout, order = layout_of([bits], align), groups_of_bits(bits)[1]
    assert layout.header <= size
    assert torch.equal(bits[order], torch.tensor(layout.bits, dtype=torch.long))
    assert (bits[energy.argsort(descending=True)].diff() <= 0).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 80), st.integers(0, 60), st.integers(0, 40), st.sampled_from((1, 2, 4)))
def test_more_bytes_never_expect_more_loss(count, size, more, align):
    energy = torch.rand(count, generator=torch.Generator().manual_seed(count)).double() ** 6
    errors = [
        remaining_error(energy, fit_tiers(energy, n, align)).item() for n in (size, size + more)
    ]
    assert errors[1] <= errors[0] * (1 + 1e-9)


@settings(deadline=None, max_examples=25)
@given(energies, st.integers(0, 7), st.sampled_from((1, 2)), st.sampled_from(LEVEL_SETS))
def test_no_tiers_of_as_many_bytes_are_better(energy, size, align, levels):
    least = min(
        remaining_error(energy, torch.tensor(bits)).item()
        for bits in itertools.product(levels, repeat=len(energy))
        if layout_of([torch.tensor(bits)], align).header <= size
        and whole_tiers(torch.tensor(bits), align)
    )
    assert remaining_error(energy, fit_tiers(energy, size, align, levels)).item() <= least * (
        1 + 1e-6
    )


def whole_tiers(bits: torch.Tensor, align: int) -> bool:
    """Whether the tiers would have as many bytes if all were filled up."""
    layout = layout_of([bits], align)
    full = [(b, -(-n * min(tier_bits_of(b)) // (8 * align))) for b, n in layout.groups]
    filled = [(b, n * 8 * align // min(tier_bits_of(b))) for b, n in full]
    return layout._replace(groups=tuple(filled)).header == layout.header


def test_padding_costs_little_in_wide_rows():
    energy = torch.logspace(0, -5, 1024, dtype=torch.float64)
    free = remaining_error(energy, allocate_bits(energy, 8 * 256))
    assert remaining_error(energy, fit_tiers(energy, 256, align=16)) < 1.1 * free


def test_a_row_needs_its_header():
    with pytest.raises(ValueError, match="tiers of -1 bytes"):
        fit_tiers(torch.ones(3), -1)
    with pytest.raises(ValueError, match="no room for 2 rows of 4 bytes"):
        share_bytes([[torch.ones(3)], [torch.ones(3)]], 7)


def test_one_budget_goes_to_the_part_that_needs_it():
    energy = torch.logspace(0, -3, 64)
    loud, quiet = share_bytes([[10 * energy], [energy]], 40)
    sizes = [layout_of(bits, 2).row_bytes for bits in (loud, quiet)]
    assert sum(sizes) <= 40
    assert sum(sizes) > 32
    assert sizes[0] > sizes[1]
    alike = share_bytes([[energy], [energy]], 40)
    assert torch.equal(alike[0][0], alike[1][0])


@st.composite
def models(draw):
    """Energies of parts in blocks, as of layers that differ a lot, and a size of their rows."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    align = draw(st.sampled_from((1, 2, 4, 16)))
    parts = [
        [
            10 ** draw(st.integers(-6, 3))
            * torch.rand(draw(st.integers(1, 40)), generator=generator).double() ** 4
            for _ in range(draw(st.integers(1, 4)))
        ]
        for _ in range(draw(st.integers(1, 6)))
    ]
    levels = draw(st.sampled_from(LEVEL_SETS))
    least = least_row_bytes(align, levels) * len(parts)
    return parts, least + draw(st.integers(0, 200)), align, levels


@settings(deadline=None, max_examples=60)
@given(models())
def test_shares_keep_to_the_budget_and_leave_no_part_out(model):
    parts, total, align, levels = model
    found = share_bytes(parts, total, align, levels)
    rows = [layout_of(bits, align).row_bytes for bits in found]
    assert sum(rows) <= total
    assert all(row % 4 == 0 for row in rows)
    for part, bits in zip(parts, found, strict=True):
        assert [len(energy) for energy in part] == [len(block) for block in bits]
        assert sum(int((block > 0).sum()) for block in bits) >= 1
        assert all(set(block.tolist()) <= set(levels) for block in bits)


def test_rows_that_overrun_would_be_seen():
    """Negative control of the check above: two parts that take the bits of one each."""
    energy = torch.logspace(0, -3, 64)
    (alone,) = share_bytes([[energy]], 40)
    assert 2 * layout_of(alone, 2).row_bytes > 40


def expected_loss(parts, found) -> float:
    return sum(
        remaining_error(energy, bits).item()
        for part, blocks in zip(parts, found, strict=True)
        for energy, bits in zip(part, blocks, strict=True)
    )


@pytest.mark.parametrize("seed", range(20))
def test_more_budget_never_expects_more_loss(seed):
    """By two words a part, as long as bytes are scarce: less than two bits a number."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        [torch.rand(128, generator=generator).double() ** 4 * 3.0 ** ((seed % 3 - 1) * part)]
        for part in range(4)
    ]
    losses = [expected_loss(parts, share_bytes(parts, total, 2)) for total in (32, 64, 96, 128)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 1.5 * losses[-1]


def test_bytes_that_make_no_word_change_nothing():
    parts = [[torch.logspace(0, -3, 30), torch.logspace(-1, -3, 9)], [torch.logspace(1, -5, 20)]]
    found = [share_bytes(parts, total, 2) for total in (40, 41, 43, 44)]
    bits = [torch.cat([block for part in one for block in part]) for one in found]
    assert torch.equal(bits[0], bits[1])
    assert torch.equal(bits[0], bits[2])
    assert not torch.equal(bits[0], bits[3])


def test_parts_without_energy_have_a_code_too():
    parts = [[torch.zeros(16)], [torch.ones(16), torch.zeros(16)], [torch.zeros(1)]]
    for levels in LEVEL_SETS:
        found = share_bytes(parts, 3 * 16, 2, levels)
        assert all(any(block.any() for block in part) for part in found)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 5)), min_size=1, max_size=8),
    st.integers(0, 60),
)
def test_whole_units_are_near_those_wanted(wanted, more):
    sizes, least = zip(*wanted, strict=True)
    total = sum(least) + more
    units = share_units(sizes, total, least)
    assert sum(units) <= total
    assert all(unit >= low for unit, low in zip(units, least, strict=True))
    assert all(
        unit <= max(low, int(size)) + 1 for unit, (size, low) in zip(units, wanted, strict=True)
    )
    with pytest.raises(ValueError, match="cannot hold"):
        share_units(sizes, sum(least) - 1, least)


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


def test_the_metric_of_few_tokens_is_shrunk_to_the_identity():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(500, 6, generator=generator) * torch.tensor([3.0, 1, 1, 1, 1, 0])
    moment = gradient.double().mT @ gradient.double() / 500
    metrics = [fisher_metric(moment, tokens) for tokens in (1, 500, 10**9)]
    for metric in metrics:
        torch.testing.assert_close(metric.trace(), moment.trace())
    assert metrics[0][5, 5] > metrics[1][5, 5] > metrics[2][5, 5] > 0 == moment[5, 5]
    torch.testing.assert_close(metrics[2], moment, atol=1e-6, rtol=0)
    assert (metrics[0] - moment).abs().max() > 1  # negative control: few tokens say little


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
