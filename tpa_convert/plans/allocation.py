"""Shares one budget among many layers: where the next number buys most. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lower_convex_envelope(values: Tensor) -> Tensor:
    """The largest convex sequence below `values` [n], on the same grid.

    Between the points that it keeps, the envelope is a straight line: a curve that falls late is
    only worth entering as a whole.
    """
    kept: list[int] = []
    points = values.tolist()
    for i, value in enumerate(points):
        while len(kept) > 1:
            a, b = kept[-2:]
            if (points[b] - points[a]) * (i - b) < (value - points[b]) * (b - a):
                break
            kept.pop()
        kept.append(i)
    envelope = torch.empty(len(points), dtype=torch.float64)
    for a, b in zip(kept, [*kept[1:], kept[-1]], strict=True):
        share = torch.linspace(0, 1, b - a + 1, dtype=torch.float64)
        envelope[a : b + 1] = points[a] + share * (points[b] - points[a])
    return envelope


def allocate(losses: Sequence[Tensor], units: int) -> list[int]:
    """Units of budget for each of several curves, minimising the sum of their losses.

    Greedy by marginal gain, which is optimal for convex curves; others count as their lower convex
    envelopes.

    Args:
        losses: one decreasing curve each, fp64 [n]; entry i is the loss with i + 1 units.
        units: to share out, at least one a curve and at most their lengths together.

    Returns: units of each curve, at least one; their sum is `units`.

    Raises:
        ValueError: `units` too few or too many.
    """
    if not len(losses) <= units <= sum(len(curve) for curve in losses):
        raise ValueError(f"{units} units for {len(losses)} curves")
    gains = [-lower_convex_envelope(curve).diff() for curve in losses]
    owner = torch.repeat_interleave(
        torch.arange(len(losses)), torch.tensor([len(gain) for gain in gains])
    )
    # A stable sort takes the units of one curve in order also where its gains are equal.
    best = torch.cat(gains).sort(descending=True, stable=True).indices[: units - len(losses)]
    return (1 + owner[best].bincount(minlength=len(losses))).tolist()


def interpolate_loss(error: Tensor, measured_error: Tensor, measured_loss: Tensor) -> Tensor:
    """Loss at any truncation error, from the losses measured at some.

    A power law between neighbours, and a loss in proportion to the error beyond the ends.

    Args:
        error: squared truncation errors, fp64 [n], zero or positive.
        measured_error: ascending and positive, fp64 [m].
        measured_loss: [m], made non-decreasing and positive first, since it may be noisy.

    Returns: fp64 [n], non-decreasing in `error`, zero where that is zero.
    """
    x = measured_error.log()
    floor = 1e-9 * measured_loss.max().clamp_min(1e-12)
    y = measured_loss.clamp_min(floor).cummax(0).values.log()
    query = error.clamp_min(1e-300).log()
    right = torch.searchsorted(x, query).clamp(1, max(1, len(x) - 1))
    left = right - 1
    right = right.clamp_max(len(x) - 1)
    slope = torch.where(
        (query < x[0]) | (query > x[-1]) | (right == left),
        torch.ones((), dtype=x.dtype),
        (y[right] - y[left]) / (x[right] - x[left]).clamp_min(1e-12),
    )
    anchor = torch.where(query > x[-1], len(x) - 1, torch.where(query < x[0], 0, left))
    return torch.where(error > 0, (y[anchor] + slope * (query - x[anchor])).exp(), 0.0)
