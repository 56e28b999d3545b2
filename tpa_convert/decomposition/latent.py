"""Latent keys: principal components of all heads and all rotary pairs together, before rotation.

A map that mixes rotary pairs does not commute with RoPE, so these components are cached unrotated
and the keys are rebuilt and rotated where they are used. That costs arithmetic at every step and
reaches what no exact rotated component can: the redundancy of keys across pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_convert.decomposition.factors import AttentionWeights, LatentKeyFactors
from tpa_convert.decomposition.gauge import score_weights
from tpa_convert.decomposition.moments import LayerMoments


def latent_components(moments: LayerMoments) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues [g d], ascending, and eigenvectors of D cov(k) D, with the diagonal w of D."""
    weight = score_weights(moments.query_energy).repeat(1, 2).flatten()  # both halves of a head
    eigenvalues, vectors = torch.linalg.eigh(weight[:, None] * moments.key_covariance * weight)
    return eigenvalues.clamp_min(0), vectors, weight


def decompose_latent_keys(
    weights: AttentionWeights, moments: LayerMoments, width: int
) -> LatentKeyFactors:
    """Principal components of the keys around their mean, weighed by the energy of the queries.

    With D = diag(w), μ the mean key and Q the leading eigenvectors of D cov(k) D,
    k ≈ μ + D⁻¹ Q Qᵀ D (k − μ). What of this does not depend on the token is the offset: unlike that
    of rotated keys a constant is no constant of the scores, but neither does it cost any cache.

    Args:
        width: numbers cached per token, at most g d.
    """
    groups, head_dim, _ = weights.key.shape
    _, vectors, weight = latent_components(moments)
    vectors = vectors[:, -width:].flip(-1)
    encode, decode = vectors.mT * weight, vectors / weight[:, None]
    key, mean = weights.key.flatten(0, 1), moments.key_mean
    offset = mean + decode @ (encode @ (key[:, -1] - mean))
    feature = encode @ key
    feature[:, -1] = 0.0
    return LatentKeyFactors(
        feature,
        decode.unflatten(0, (groups, head_dim)),
        offset.unflatten(0, (groups, head_dim)),
    )
