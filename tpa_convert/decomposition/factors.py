"""What a decomposition takes and gives: the weights of one attention layer, and its TPA factors.

Everything here is affine in the homogeneous input [x, 1]: weights have one more column than the
hidden size, which holds the bias (zero where the source has none).

Letters: h query heads, g key/value heads, d head dim, f rotary pairs (d = 2 f), D hidden size,
p key components (pairs), w value width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

LEAST_NORM_WEIGHT = 3e-5  # of the largest


@dataclass(frozen=True)
class HeadNorm:
    """An RMS norm over each head, or over all heads together (QK-norm): γ ⊙ x / √(mean x² + ε).

    Args:
        weight: γ, [d] for each head or [heads, d] for all together.
        eps: ε.
    """

    weight: Tensor
    eps: float

    @property
    def divisor(self) -> Tensor:
        """γ kept away from zero, [d]: what keys are multiplied with so that they can be divided by
        it again. Real models have weights that are zero, and the norm sees such keys all the same.
        """
        least = LEAST_NORM_WEIGHT * self.weight.abs().max()
        return torch.where(self.weight.abs() < least, least, self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalises heads x [..., heads, d]."""
        return self.weight * x * self._scale(x)

    def scale(self, weighted: Tensor) -> Tensor:
        """The factor [..., heads or 1, 1] that normalises `divisor` ⊙ x, which is given
        [..., heads, d]: 1 / √(mean x² + ε)."""
        return self._scale(weighted / self.divisor)

    def _scale(self, x: Tensor) -> Tensor:
        together = -1 if self.weight.ndim == 1 else (-2, -1)
        return (x.square().mean(together, keepdim=True) + self.eps).rsqrt()

    def to(self, device: torch.device, dtype: torch.dtype) -> HeadNorm:
        """The same norm elsewhere."""
        return replace(self, weight=self.weight.to(device, dtype))


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of one attention layer, rotary pairs half-split over the whole head.

    Args:
        query: [h, d, D + 1].
        key: [g, d, D + 1]; of keys that are normalised γ ⊙ W_K, the norm's `divisor` folded in.
        value: [g, d, D + 1].
        output: [D, h, d].
        output_bias: [D], or None.
        scale: factor on the scores before softmax.
        query_norm, key_norm: of models with QK-norm. `query` does not hold the weight of its norm.
        window: tokens that a query attends to, its own included; None for all.
        softcap: c of scores c tanh(score / c), or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    output_bias: Tensor | None
    scale: float
    query_norm: HeadNorm | None = None
    key_norm: HeadNorm | None = None
    window: int | None = None
    softcap: float | None = None

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.query.shape[0] // self.key.shape[0]


@dataclass(frozen=True)
class KeyFactors:
    """k_j ≈ Σ_p T_{j,p} b_p on rotary pair `rotary_pair[p]`, with b = feature · [x, 1].

    Args:
        feature: complex [p, D + 1].
        gauge: complex T, [g, p].
        rotary_pair: int64 [p], the source's rotary pair of each component.
        head_factor: [R, g] if T_{j,p} is the real number a_{r,j} for all pairs of component r, with
            R components of all f pairs in order (the layer of the paper); else None.
    """

    feature: Tensor
    gauge: Tensor
    rotary_pair: Tensor
    head_factor: Tensor | None = None


@dataclass(frozen=True)
class LatentKeyFactors:
    """k_j ≈ T_j b + c_j before rotation, with b = feature · [x, 1].

    Args:
        feature: [w, D + 1].
        gauge: T, [g, d, w].
        offset: c, [g, d].
    """

    feature: Tensor
    gauge: Tensor
    offset: Tensor


@dataclass(frozen=True)
class ValueFactors:
    """v_j ≈ U_j b, with b = feature · [x, 1].

    Args:
        feature: [w, D + 1].
        gauge: U, [g, d, w].
        head_factor: [R, g] if U_j = [a_{1,j}·1, …, a_{R,j}·1] (the layer of the paper), else None.
    """

    feature: Tensor
    gauge: Tensor
    head_factor: Tensor | None = None


Factors = TypeVar("Factors", KeyFactors, LatentKeyFactors, ValueFactors)


def with_unit_gauge(factors: Factors) -> Factors:
    """The same map with each component's gauge over all heads of unit norm.

    Components are only defined up to a factor that the gauge takes back. Optimisers with one rate
    for all weights (Adam) need it to be one that leaves the features and what the gauge is folded
    into at the scale of the source's projections: what whitening leaves has features tens of times
    too large, which then hardly move, beside gauges that move too far.
    """
    norm = torch.linalg.vector_norm(factors.gauge.flatten(0, -2), dim=0)
    norm = torch.where(norm > 0, norm, 1.0)
    return replace(factors, feature=factors.feature * norm[:, None], gauge=factors.gauge / norm)


def to_complex_pairs(x: Tensor, dim: int) -> Tensor:
    """Complex view of half-split features: size d along `dim` becomes f = d / 2."""
    real, imaginary = x.chunk(2, dim)
    return torch.complex(real, imaginary)


def to_half_split(x: Tensor, dim: int) -> Tensor:
    """Inverse of `to_complex_pairs`."""
    return torch.cat((x.real, x.imag), dim)


def symmetric_power(matrix: Tensor, exponent: float, tolerance: float = 1e-12) -> Tensor:
    """Power of a symmetric positive semi-definite matrix [..., n, n] through its eigenvalues.

    Directions whose eigenvalue is below `tolerance` times the largest are treated as absent: zero
    in the result also for negative exponents (pseudo-inverse).
    """
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    floor = tolerance * eigenvalues[..., -1:].clamp_min(0)
    present = eigenvalues > floor
    powers = torch.where(present, eigenvalues.clamp_min(1e-300), 1.0) ** exponent
    return (vectors * (powers * present).unsqueeze(-2)) @ vectors.mH
