"""Decompositions of the (head × feature × input) tensor of the weights: SVD, Tucker and CP.

They are the ungauged ways to factors: head factors are real numbers. Whitening the input mode by
the covariance G = W C Wᵀ of the keys or values needs no D × D matrix: up to a rotation of the input
mode, which no decomposition here sees, the whitened tensor is G^½, and G^-½ W takes it back.
"""

from __future__ import annotations

import warnings

import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor

from tpa_convert.decomposition.factors import (
    AttentionWeights,
    KeyFactors,
    ValueFactors,
    to_complex_pairs,
)
from tpa_convert.decomposition.gauge import allocate_components, score_weights
from tpa_convert.decomposition.moments import LayerMoments


def whiten(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened tensor [g, d, n] of `weight` [g, d, D + 1], and the map [n, D + 1] that undoes it.

    Args:
        covariance: [g d, g d], second moment of the outputs W x.
    """
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    present = eigenvalues > 1e-12 * eigenvalues[-1]
    root, vectors = eigenvalues[present].sqrt(), vectors[:, present]
    whitened = (vectors * root).unflatten(0, weight.shape[:2])
    return whitened, (vectors / root).mT @ weight.flatten(0, 1)


def head_svd(weight: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best R real head factors in the whitened norm: W_j ≈ Σ_r a_{r,j} B_r.

    Returns: head factors [R, g] and features [R, d, D + 1].
    """
    whitened, _ = whiten(weight, covariance)
    left, _, _ = torch.linalg.svd(whitened.flatten(1), full_matrices=False)
    head_factor = left[:, :rank].mT
    return head_factor, torch.einsum("rg,gdx->rdx", head_factor, weight)


def decompose_keys_svd(
    weights: AttentionWeights, moments: LayerMoments, width: int, rank: int | None = None
) -> KeyFactors:
    """The layer of the paper from an SVD over heads; `width` (R d) decides the rank."""
    _, head_dim, _ = weights.key.shape
    head_factor, feature = head_svd(weights.key, moments.key_covariance, width // head_dim)
    feature = to_complex_pairs(feature, 1).flatten(0, 1)
    pairs = head_dim // 2
    return KeyFactors(
        feature=feature,
        gauge=head_factor.mT.repeat_interleave(pairs, dim=1).to(feature.dtype),
        rotary_pair=torch.arange(pairs, device=feature.device).repeat(len(head_factor)),
        head_factor=head_factor,
    )


def decompose_values_svd(
    weights: AttentionWeights, moments: LayerMoments, width: int, metric: Tensor
) -> ValueFactors:
    """The layer of the paper from an SVD over heads; `metric` is not used (U = 1 has no choice)."""
    _, head_dim, _ = weights.value.shape
    head_factor, feature = head_svd(weights.value, moments.value_covariance, width // head_dim)
    identity = torch.eye(head_dim, dtype=feature.dtype, device=feature.device)
    gauge = torch.einsum("rg,de->gdre", head_factor, identity).flatten(2)
    return ValueFactors(feature.flatten(0, 1), gauge, head_factor)


def pair_tensors(weights: AttentionWeights, moments: LayerMoments) -> list[tuple[Tensor, Tensor]]:
    """Per rotary pair, the whitened tensor [g, 2, n], weighted by the queries, and its inverse."""
    groups, head_dim, _ = weights.key.shape
    score_gf = score_weights(moments.query_energy)
    key = weights.key.unflatten(1, (2, -1)) * score_gf[:, None, :, None]
    covariance = moments.key_covariance.reshape(groups, 2, head_dim // 2, groups, 2, head_dim // 2)
    result = []
    for f in range(head_dim // 2):
        weight = score_gf[:, f].repeat_interleave(2)
        block = covariance[:, :, f, :, :, f].reshape(2 * groups, 2 * groups) * weight.outer(weight)
        result.append(whiten(key[:, :, f], block))
    return result


def tucker_pairs(tensors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Tucker decomposition of the head mode of each pair tensor (TensorLy).

    Returns: head factors [f, g, g] (columns), their energies [f, g], cores [g, 2, n] per pair.
    """
    factors, cores = [], []
    with tensorly.backend_context("pytorch"):
        for tensor, _ in tensors:
            (core, (factor,)), _ = partial_tucker(tensor, rank=[tensor.shape[0]], modes=[0])
            factors.append(factor)
            cores.append(core)
    energies = torch.stack([core.square().sum((1, 2)) for core in cores])
    return torch.stack(factors), energies, cores


def decompose_keys_tucker(
    weights: AttentionWeights, moments: LayerMoments, width: int, rank: int | None = None
) -> KeyFactors:
    """Real head factors inside each rotary pair; the budget goes where the energy is."""
    tensors = pair_tensors(weights, moments)
    factors, energies, cores = tucker_pairs(tensors)
    rotary_pair, component = allocate_components(energies, width // 2, rank)
    feature = torch.stack(
        [cores[f][r] @ tensors[f][1] for f, r in zip(rotary_pair, component, strict=True)]
    )
    score_pg = score_weights(moments.query_energy).mT[rotary_pair]
    gauge = factors[rotary_pair, :, component] / score_pg
    feature = torch.complex(*feature.unbind(1))
    return KeyFactors(feature, gauge.mT.to(feature.dtype), rotary_pair)


def decompose_keys_cp(
    weights: AttentionWeights, moments: LayerMoments, width: int, rank: int | None = None
) -> KeyFactors:
    """CP inside each rotary pair, with as many components as Tucker's energies give the pair."""
    tensors = pair_tensors(weights, moments)
    _, energies, _ = tucker_pairs(tensors)
    rotary_pair, _ = allocate_components(energies, width // 2, rank)
    features, gauges = [], []
    for f, count in enumerate(rotary_pair.bincount(minlength=len(tensors)).tolist()):
        if count:
            tensor, unwhiten = tensors[f]
            head, pair, inputs = cp_factors(tensor, count)
            features.append(torch.complex(*pair)[:, None] * (inputs.mT @ unwhiten))
            gauges.append(head / score_weights(moments.query_energy)[:, f, None])
    feature = torch.cat(features)
    return KeyFactors(feature, torch.cat(gauges, dim=1).to(feature.dtype), rotary_pair)


def cp_factors(tensor: Tensor, rank: int, iterations: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """CP factors of a third-order tensor by alternating least squares (TensorLy).

    The weights of the components are folded into the first factor.
    """
    with tensorly.backend_context("pytorch"), warnings.catch_warnings():
        # More components than a mode has entries are meant here; the rest start at random.
        warnings.filterwarnings("ignore", "Trying to compute SVD", UserWarning)
        weights, factors = parafac(
            tensor, rank=rank, n_iter_max=iterations, init="svd", tol=1e-7, random_state=0
        )
    first, second, third = factors
    return first * weights, second, third


def decompose_values_cp(
    weights: AttentionWeights, moments: LayerMoments, width: int, metric: Tensor
) -> ValueFactors:
    """CP of the value tensor: each cached number has a head factor and a feature vector.

    `metric` is not used: the head mode of a CP has no room for one metric per head.
    """
    whitened, unwhiten = whiten(weights.value, moments.value_covariance)
    head, pair, inputs = cp_factors(whitened, width)
    return ValueFactors(inputs.mT @ unwhiten, torch.einsum("gw,dw->gdw", head, pair))


def tucker_ranks(width: int, groups: int, head_dim: int) -> list[tuple[int, int]]:
    """Ranks of the head and of the feature mode whose product is `width`; there may be none."""
    return [
        (rank, width // rank)
        for rank in range(1, groups + 1)
        if width % rank == 0 and width // rank <= head_dim
    ]


def decompose_values_tucker(
    weights: AttentionWeights, moments: LayerMoments, width: int, metric: Tensor
) -> ValueFactors:
    """Tucker of the head and feature modes, with the head rank that leaves the least error.

    `metric` is not used, as for CP.
    """
    whitened, unwhiten = whiten(weights.value, moments.value_covariance)
    ranks = tucker_ranks(width, *weights.value.shape[:2])
    with tensorly.backend_context("pytorch"):
        candidates = [partial_tucker(whitened, rank=r, modes=[0, 1])[0] for r in ranks]
    core, (head, feature) = max(candidates, key=lambda c: c[0].square().sum())
    return ValueFactors(
        core.flatten(0, 1) @ unwhiten, torch.einsum("gr,de->gdre", head, feature).flatten(2)
    )
