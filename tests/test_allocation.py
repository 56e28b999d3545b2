"""Sharing a budget among curves: against brute force, and by the properties that define it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpa_convert.plans.allocation import allocate, interpolate_loss, lower_convex_envelope

values = st.lists(st.floats(0, 100), min_size=1, max_size=6)
falling = values.map(lambda x: torch.tensor(sorted(x, reverse=True), dtype=torch.float64))
convex = st.lists(st.floats(0, 10), min_size=0, max_size=4).map(
    lambda steps: torch.tensor([0.0, *sorted(steps)], dtype=torch.float64).cumsum(0).flip(0)
)


@given(falling)
def test_the_envelope_is_convex_and_touches_from_below(curve: Tensor) -> None:
    envelope = lower_convex_envelope(curve)
    assert (envelope <= curve + 1e-9).all()
    assert (envelope.diff().diff() >= -1e-9).all()
    assert envelope[0] == curve[0]
    assert envelope[-1] == curve[-1]


@given(convex)
def test_the_envelope_of_a_convex_curve_is_the_curve(curve: Tensor) -> None:
    torch.testing.assert_close(lower_convex_envelope(curve), curve)


@settings(max_examples=50)
@given(st.lists(convex, min_size=1, max_size=3), st.data())
def test_no_other_allocation_loses_less(curves: list[Tensor], data: st.DataObject) -> None:
    units = data.draw(st.integers(len(curves), sum(map(len, curves))))
    counts = allocate(curves, units)
    assert sum(counts) == units

    def loss(counts) -> float:
        return sum(curve[n - 1].item() for curve, n in zip(curves, counts, strict=True))

    every = itertools.product(*(range(1, len(curve) + 1) for curve in curves))
    best = min(loss(other) for other in every if sum(other) == units)
    assert loss(counts) == pytest.approx(best, abs=1e-9)


def test_a_flat_curve_that_falls_late_is_entered_as_a_whole() -> None:
    late = torch.tensor([10.0, 10.0, 10.0, 0.0], dtype=torch.float64)
    steady = torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64)
    assert allocate([late, steady], 5) == [4, 1]


@pytest.mark.parametrize("units", [1, 8])
def test_impossible_budgets(units) -> None:
    curve = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="units for 2 curves"):
        allocate([curve, curve], units)


def test_interpolation_keeps_to_what_was_measured() -> None:
    error = torch.tensor([0.1, 0.2, 0.9], dtype=torch.float64)
    loss = torch.tensor([0.01, 0.05, 2.0], dtype=torch.float64)
    torch.testing.assert_close(interpolate_loss(error, error, loss), loss)


def test_interpolation_follows_a_power_law_and_is_linear_beyond_the_ends() -> None:
    measured = torch.tensor([0.01, 1.0], dtype=torch.float64)
    loss = measured**2
    between = torch.tensor([0.1], dtype=torch.float64)
    torch.testing.assert_close(interpolate_loss(between, measured, loss), between**2)
    beyond = torch.tensor([0.0, 0.005, 3.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.5 * 1e-4, 3.0], dtype=torch.float64)
    torch.testing.assert_close(interpolate_loss(beyond, measured, loss), expected)


@given(st.lists(st.floats(-1e-3, 1), min_size=1, max_size=4))
def test_noisy_measurements_still_give_a_falling_curve(losses: list[float]) -> None:
    measured = torch.linspace(0.2, 0.8, len(losses), dtype=torch.float64)
    error = torch.linspace(0, 1, 30, dtype=torch.float64)
    curve = interpolate_loss(error, measured, torch.tensor(losses, dtype=torch.float64))
    assert (curve >= 0).all()
    assert (curve.diff() >= -1e-12).all()
