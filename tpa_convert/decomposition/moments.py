"""Second moments of one attention layer on calibration text, and their data-free stand-in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tpa_convert.decomposition.factors import AttentionWeights, to_complex_pairs


@dataclass(frozen=True)
class LayerMoments:
    """What the decompositions need to know of one layer's activations. Letters as in `factors`.

    Args:
        pair_covariance: complex Hermitian [f, g, g]. Covariance across key/value heads of the
            rotated keys on each rotary pair, tokens weighted by attention and centred under it: the
            second-order term of KL(p ‖ p̂) is half the variance of the score error under p.
        query_energy: [g, f], Σ over the query heads i of a group of E|q_{i,f}|².
        key_covariance: [g d, g d], the same covariance of the keys before rotation, all features.
        key_mean: [g d], E[Σ_t p_t k_t] of the keys before rotation.
        value_covariance: [g d, g d], E[z zᵀ] of the attention-mixed values z = Σ_t p_t v_t.
        constant_functional: [D], the linear functional of the attention input closest to the
            constant 1 (C⁻¹ μ with C = E[x xᵀ], μ = E[x]).
        constant_residual: mean squared error of that functional, 1 − μᵀ C⁻¹ μ.
    """

    complex_fields: ClassVar[tuple[str, ...]] = ("pair_covariance",)

    pair_covariance: Tensor
    query_energy: Tensor
    key_covariance: Tensor
    key_mean: Tensor
    value_covariance: Tensor
    constant_functional: Tensor
    constant_residual: Tensor


def constant_functional(second_moment: Tensor, mean: Tensor, damping: float = 1e-6):
    """The linear functional w·x closest to the constant 1 in mean square, and its squared error.

    Args:
        second_moment: C = E[x xᵀ], [D, D].
        mean: μ = E[x], [D].
        damping: added to the diagonal, relative to its mean.

    Returns: w = C⁻¹ μ, [D], and E(1 − w·x)² = 1 − 2 wᵀμ + wᵀCw, a scalar.
    """
    identity = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    damped = second_moment + damping * second_moment.diagonal().mean() * identity
    functional = torch.linalg.solve(damped, mean)
    residual = 1 - 2 * functional @ mean + functional @ second_moment @ functional
    return functional, residual


class DataFreeMoments(LayerMoments):
    """Moments as if inputs were white, queries equally strong and the mean input zero.

    With these the decompositions approximate the weights themselves, not what attention does. Each
    is computed whenever it is asked for: of a large layer they are as large as its weights, and no
    decomposition needs them all.

    Args:
        weights: of the layer.
    """

    weights: AttentionWeights

    def __init__(self, weights: AttentionWeights):
        vars(self)["weights"] = weights  # the class is frozen

    @property
    def pair_covariance(self) -> Tensor:  # type: ignore[override]
        pairs = to_complex_pairs(self.weights.key, 1)
        return torch.einsum("gfx,hfx->fgh", pairs, pairs.conj())

    @property
    def query_energy(self) -> Tensor:  # type: ignore[override]
        groups, head_dim, _ = self.weights.key.shape
        return self.weights.key.new_ones(groups, head_dim // 2)

    @property
    def key_covariance(self) -> Tensor:  # type: ignore[override]
        key = self.weights.key.flatten(0, 1)
        return key @ key.mT

    @property
    def key_mean(self) -> Tensor:  # type: ignore[override]
        return self.weights.key.new_zeros(self.weights.key[..., 0].numel())

    @property
    def value_covariance(self) -> Tensor:  # type: ignore[override]
        value = self.weights.value.flatten(0, 1)
        return value @ value.mT

    @property
    def constant_functional(self) -> Tensor:  # type: ignore[override]
        return self.weights.key.new_zeros(self.weights.key.shape[-1] - 1)

    @property
    def constant_residual(self) -> Tensor:  # type: ignore[override]
        return self.weights.key.new_ones(())
