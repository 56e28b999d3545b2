"""Bits go where they take most error away, and keep to their bytes."""

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_convert.coding import (
    allocate_bits,
    fit_tiers,
    groups_of_bits,
    least_row_bytes,
    mean_bits,
    remaining_error,
    share_bytes,
)
from tpa_convert.coding.allocation import GAUSSIAN_ERROR, GAUSSIAN_STEP, envelope, share_words
from tpa_convert.modeling import RowLayout
from tpa_convert.modeling.tpa_codes import tier_bits_of

LEVEL_SETS = ((0, 1, 2, 3, 4, 8), (0, 1, 2, 4, 8), (0, 2, 4, 8), (0, 4), (0, 3), (0, 1))
energies = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=4).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


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
    return replace(layout, groups=tuple(filled)).header == layout.header


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


@settings(deadline=None, max_examples=60)
@given(models(), st.integers(1, 40))
def test_more_budget_never_expects_more_loss(model, more):
    parts, total, align, levels = model
    less, greater = (
        expected_loss(parts, share_bytes(parts, size, align, levels))
        for size in (total, total + 4 * more)
    )
    assert greater <= less * (1 + 1e-9)


def test_bytes_for_all_leave_what_the_highest_level_leaves():
    """Budgets that everything fits into; a byte less for each part does not do."""
    parts = [[torch.rand(50).double() + 0.1, torch.rand(9).double() + 0.1] for _ in range(3)]
    best = sum(GAUSSIAN_ERROR[8] * energy.sum().item() for part in parts for energy in part)
    assert expected_loss(parts, share_bytes(parts, 3 * 64, 1)) == pytest.approx(best)
    assert expected_loss(parts, share_bytes(parts, 3 * 56, 1)) > 1.01 * best


def test_bytes_that_make_no_word_change_nothing():
    parts = [[torch.logspace(0, -3, 30), torch.logspace(-1, -3, 9)], [torch.logspace(1, -5, 20)]]
    found = [share_bytes(parts, total, 2) for total in (40, 41, 43, 44)]
    bits = [torch.cat([block for part in one for block in part]) for one in found]
    assert torch.equal(bits[0], bits[1])
    assert torch.equal(bits[0], bits[2])
    assert not torch.equal(bits[0], bits[3])


@cache
def best_mean(fall: int, total: int) -> float:
    """Of bits that are handed out freely."""
    return mean_bits(share_bytes(falling(fall), total))


def falling(fall: int) -> list[list[torch.Tensor]]:
    layers = [torch.logspace(0, fall, 1024).double() * 3.0**i for i in range(2)]
    return [[energy[::2], energy[1::2]] for energy in layers]


@pytest.mark.parametrize("mean", [1, 2, 3, 4, 8])
def test_a_mean_of_bits_is_that_of_the_components_that_are_kept(mean) -> None:
    """Of energies that fall slowly, so that the best has few bits, and quickly, so that it has
    many; what is kept are the strongest."""
    total, best = 2 * 120, []
    for fall in (-1, -8):
        parts = falling(fall)
        found = share_bytes(parts, total, mean=mean)
        assert mean_bits(found) == pytest.approx(mean, rel=0.1)
        assert sum(layout_of(part, 2).row_bytes for part in found) <= total
        energy = torch.cat([block for part in parts for block in part])
        kept = torch.cat([block for part in found for block in part]) > 0
        assert (energy[~kept] > 2 * energy[kept].quantile(0.05)).double().mean() < 0.02
        alike = share_bytes(parts, total, levels=(0, mean))  # all kept components as many
        assert expected_loss(parts, found) < 1.02 * expected_loss(parts, alike)
        best.append(best_mean(fall, total))
    # negative control: what is best has other means
    assert any(abs(free - mean) > 0.2 * mean for free in best)


def test_parts_without_energy_have_a_code_too():
    parts = [[torch.zeros(16)], [torch.ones(16), torch.zeros(16)], [torch.zeros(1)]]
    for levels in LEVEL_SETS:
        found = share_bytes(parts, 3 * 16, 2, levels)
        assert all(any(block.any() for block in part) for part in found)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(0, 12), st.integers(0, 99))
def test_words_go_where_they_help_most(lengths, spare, seed):
    """Convex errors: no word could help more in another row."""
    generator = torch.Generator().manual_seed(seed)
    errors = [
        torch.rand(n, generator=generator, dtype=torch.float64).sort().values.cumsum(0).flip(0)
        for n in lengths
    ]
    words = share_words(errors, len(errors) + spare, least=1)
    assert sum(words) <= len(errors) + spare
    gained = [
        (error[w - 1] - error[w]).item() for error, w in zip(errors, words, strict=True) if w > 1
    ]
    missed = [
        (error[w] - error[w + 1]).item()
        for error, w in zip(errors, words, strict=True)
        if w + 1 < len(error)
    ]
    assert not missed or sum(words) == len(errors) + spare
    assert not missed or not gained or min(gained) >= max(missed)
