"""Gauge decomposition: principal components across key/value heads, exact under RoPE.

Keys: inside each rotary pair the g key heads are complex numbers; their principal components
commute with RoPE, so they can be cached rotated and the per-head maps T folded into the queries.
Values: principal components of all heads together in the metric of the output projection; the maps
U fold into it. See docs/mathematics.md for the derivation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_convert.decomposition.factors import (
    AttentionWeights,
    KeyFactors,
    ValueFactors,
    symmetric_power,
    to_complex_pairs,
)
from tpa_convert.decomposition.moments import LayerMoments


def score_weights(query_energy: Tensor, floor: float = 1e-6) -> Tensor:
    """w_{j,f} = √(query energy), [g, f], kept away from zero so that dividing by it is safe."""
    return query_energy.clamp_min(floor * query_energy.mean()).sqrt()


def key_components(moments: LayerMoments) -> tuple[Tensor, Tensor]:
    """Eigenvalues [f, g], ascending, and eigenvectors [f, g, g] of weighted pair covariances."""
    weight_fg = score_weights(moments.query_energy).mT
    weighted = moments.pair_covariance * weight_fg[:, :, None] * weight_fg[:, None, :]
    eigenvalues, vectors = torch.linalg.eigh(weighted)
    return eigenvalues.clamp_min(0), vectors


def allocate_components(
    energy: Tensor, count: int, rank: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Picks the `count` strongest components over all rotary pairs.

    Args:
        energy: [f, g], one non-negative entry per candidate component.
        count: components to pick, at most f times the rank (g without one).
        rank: most components on any one pair, or None for no limit; or how many each pair gets,
            int64 [f], of the sum `count`.

    Returns: rotary pair and component index of each, int64 [count], ordered by pair.
    """
    if isinstance(rank, Tensor):
        place = energy.argsort(dim=1, descending=True).argsort(dim=1)
        pair, component = (place < rank[:, None]).nonzero(as_tuple=True)
        return pair, component
    if rank is not None and rank < energy.shape[1]:
        beyond = energy.argsort(dim=1, descending=True)[:, rank:]
        energy = energy.scatter(1, beyond, -1.0)
    chosen = energy.flatten().topk(count).indices.sort().values
    return chosen // energy.shape[1], chosen % energy.shape[1]


def decompose_keys(
    weights: AttentionWeights, moments: LayerMoments, width: int, rank: int | Tensor | None = None
) -> KeyFactors:
    """Complex principal components of keys per rotary pair; the budget goes where the energy is.

    With S the weighted covariance of a pair and u an eigenvector of it, b = uᴴ (w ⊙ k) and
    T_j = u_j / w_j.

    Args:
        width: numbers cached per token, even, at most g d.
        rank: most components on any one rotary pair, or None for no limit; or how many each pair
            gets, int64 [f].

    Returns: factors with width / 2 components, ordered by rotary pair.
    """
    eigenvalues, vectors = key_components(moments)
    rotary_pair, component = allocate_components(eigenvalues, width // 2, rank)
    vector_pg = vectors[rotary_pair, :, component]
    weight_pg = score_weights(moments.query_energy).mT[rotary_pair]
    pairs = to_complex_pairs(weights.key, 1).unbind(1)  # [g, D + 1] each
    # Pair by pair: the keys of each component, side by side, are several times the layer.
    counts = rotary_pair.bincount(minlength=len(pairs)).tolist()
    encode = (vector_pg.conj() * weight_pg).split(counts)
    feature = torch.cat([own @ pair for own, pair in zip(encode, pairs, strict=True)])
    return KeyFactors(feature, (vector_pg / weight_pg).mT.contiguous(), rotary_pair)


def value_metric(weights: AttentionWeights) -> Tensor:
    """M_j = Σ_{i∈j} O_iᵀ O_i, [g, d, d]: how an error of v_j weighs in the output."""
    output = weights.output.unflatten(1, (-1, weights.heads_per_group))
    return torch.einsum("xgnd,xgne->gde", output, output)


def value_components(
    moments: LayerMoments, metric: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues [g d], ascending, and eigenvectors of M^½ C_v M^½, with M^½ and M^{−½} of each
    head."""
    root, inverse_root = (symmetric_power(metric, exponent) for exponent in (0.5, -0.5))
    half = by_head(root, moments.value_covariance)
    eigenvalues, vectors = torch.linalg.eigh(by_head(root, half.mT))
    return eigenvalues.clamp_min(0), vectors, root, inverse_root


def by_head(matrices: Tensor, stacked: Tensor) -> Tensor:
    """One matrix for each head, [g, d, d], times what all heads have, [g d, n]."""
    return (matrices @ stacked.unflatten(0, matrices.shape[:2])).flatten(0, 1)


def truncation_errors(eigenvalues: Tensor) -> Tensor:
    """Squared error left by the strongest n of all components, n = 0 ... their number.

    Args:
        eigenvalues: non-negative, of any shape.

    Returns: descending, [number of eigenvalues + 1]; the last is zero.
    """
    ascending = eigenvalues.flatten().sort().values
    return torch.cat((ascending.new_zeros(1), ascending.cumsum(0))).flip(0)


def decompose_values(
    weights: AttentionWeights, moments: LayerMoments, width: int, metric: Tensor
) -> ValueFactors:
    """Principal components of the stacked value heads in a metric.

    Minimises Σ_j tr(M_j E[δ_j δ_jᵀ]) for the error δ of the attention-mixed values.

    Args:
        width: numbers cached per token, at most g d.
        metric: M, [g, d, d], symmetric positive semi-definite.
    """
    groups, head_dim, _ = weights.value.shape
    _, vectors, root, inverse_root = value_components(moments, metric)
    vectors = vectors[:, -width:].flip(-1)
    feature = by_head(root, vectors).mT @ weights.value.flatten(0, 1)
    gauge = by_head(inverse_root, vectors).unflatten(0, (groups, head_dim))
    return ValueFactors(feature, gauge)
