"""Components to be coded: the transform, and what an error of each component costs.

The keys (or values) of a token in one layer are n = g d numbers x. A *metric* G says what an error
of them costs: δᵀ G δ. In the coordinates G^½ x all errors count alike, so that the best transform
is the Karhunen–Loève basis there, and a component costs its energy, importance · variance.

Two metrics: that of docs/mathematics.md (w² for keys, M for values), whose units differ by layer
and part; and the Fisher information. With g the gradient of −log p(y | text), y drawn from the
model itself,

    KL(source ‖ coded) ≈ ½ E[δᵀ G δ],        G = E[g gᵀ],                                        (1)

summed over layers and parts where errors are independent. It has one unit, nats a token, for all of
them, so that it also divides the bits among layers and between keys and values. Letters as in
`decomposition.factors`; w components.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SHRINKAGE = 0.01


class Components(NamedTuple):
    """x ≈ mean + gauge · b with b = feature · (x − mean), each gauge a unit vector.

    Attributes:
        feature: [w, n].
        gauge: [n, w].
        importance: cost of a unit squared error of each component, [w].
    """

    feature: Tensor
    gauge: Tensor
    importance: Tensor


# ------------------------------------------------------------------------------- metrics


def fisher_metric(gradient: Tensor, prior: Tensor, shrinkage: float = SHRINKAGE) -> Tensor:
    """G = E[g gᵀ] (1), shrunk towards a prior of the same trace: directions in which few gradients
    happened to point may still not take any error.

    Args:
        gradient: of −log p of labels drawn from the model, summed over positions, [N, n]. Sinks are
            to be left out: attention to them is of another size, and they are coded apart.
        prior: a metric in any unit, [n, n].
        shrinkage: share of the prior.

    Returns: fp64 [n, n].
    """
    gradient, prior = gradient.double(), prior.double()
    fisher = gradient.mT @ gradient / len(gradient)
    return (1 - shrinkage) * fisher + shrinkage * fisher.trace() / prior.trace() * prior


def weighted_covariance(value: Tensor, gradient: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n] and covariance [n, n], fp64, of values [N, n] with gradients [N, n]. Each token
    weighs what an error of it costs, gᵀ G⁻¹ g."""
    value, gradient = value.double(), gradient.double()
    weight = (torch.linalg.solve(metric, gradient.mT).mT * gradient).sum(-1)
    weight = weight / weight.sum()
    mean = weight @ value
    centred = value - mean
    return mean, centred.mT @ (centred * weight[:, None])


def key_metric(query_energy: Tensor) -> Tensor:
    """diag(w²) of docs/mathematics.md, eq. 4, on both halves of each head: [g, f] to [n, n]."""
    return query_energy.repeat(1, 2).flatten().diag()


def rotated_covariance(pair_covariance: Tensor) -> Tensor:
    """Covariance [n, n] of rotated keys from the Hermitian one of each pair, complex [f, g, g]:
    phases being uniform, half of it falls to each of the real and the imaginary part."""
    pairs, groups, _ = pair_covariance.shape
    result = pair_covariance.real.new_zeros(groups, 2, pairs, groups, 2, pairs)
    f = torch.arange(pairs, device=result.device)
    half = pair_covariance / 2
    for a, b, part in ((0, 0, half.real), (1, 1, half.real), (1, 0, half.imag), (0, 1, -half.imag)):
        result[:, a, f, :, b, f] = part
    return result.view(2 * groups * pairs, -1)


def rotation_invariant(matrix: Tensor, head_dim: int) -> Tensor:
    """(M + J M Jᵀ) / 2 of a covariance or metric [n, n], J turning all rotary pairs by 90 degrees.

    Inside the pairs, this is what rotated keys have on average, and what no rotation changes. Its
    principal components inside each pair, `pair_blocks(g, d, d / 2)`, commute with RoPE.
    """
    pairs = matrix.unflatten(0, (-1, 2, head_dim // 2)).unflatten(-1, (-1, 2, head_dim // 2))
    turned = pairs.flip(1).flip(4)
    sign = matrix.new_tensor([[1.0, -1.0], [-1.0, 1.0]])[:, None, None, :, None]
    return ((pairs + sign * turned) / 2).flatten(3).flatten(0, 2)


def rotated_gauge(gauge: Tensor, rotary_pair: Tensor, pairs: int) -> Tensor:
    """The gauge T of rotated keys, complex [g, p], as a real matrix [n, 2 p] that acts on the real
    parts of all components and then on their imaginary parts."""
    groups, count = gauge.shape
    result = gauge.real.new_zeros(groups, 2, pairs, 2, count)
    p = torch.arange(count, device=gauge.device)
    for a, b, part in (
        (0, 0, gauge.real), (1, 1, gauge.real), (1, 0, gauge.imag), (0, 1, -gauge.imag),
    ):  # fmt: skip
        result[:, a, rotary_pair, b, p] = part
    return result.view(2 * groups * pairs, -1)


def importance_and_variance(
    gauge: Tensor, metric: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Of components that a decomposition has made, ι_c and σ_c².

    b is the best fit of gauge · b to x in the metric. For orthogonal components, such as those of
    `decomposition.gauge` and `decomposition.latent` in their own metric, these are their features.

    Args:
        gauge: [n, w], of full column rank.
        metric: [n, n].
        covariance: of x over tokens, [n, n].

    Returns: ι and σ², [w] each.
    """
    projected = gauge.mT @ metric
    gram = projected @ gauge
    feature = torch.linalg.solve(gram, projected)
    return gram.diagonal(), torch.einsum("wn,nm,wm->w", feature, covariance, feature)


# ------------------------------------------------------------------------------- transform


def pair_blocks(groups: int, head_dim: int, blocks: int) -> list[Tensor]:
    """Features of each of `blocks` ranges of rotary pairs, over all heads: int64 [n / blocks] each.

    Raises:
        ValueError: not all ranges would have as many pairs.
    """
    if head_dim // 2 % blocks:
        raise ValueError(f"{head_dim // 2} rotary pairs in {blocks} blocks")
    features = torch.arange(groups * head_dim).view(groups, 2, blocks, -1)
    return list(features.permute(2, 0, 1, 3).flatten(1))


def principal_components(
    covariance: Tensor, metric: Tensor, blocks: list[Tensor] | None = None
) -> Components:
    """The Karhunen–Loève basis in a metric, inside each block of features.

    Between blocks covariances and costs count as zero. Keys in blocks of rotary pairs cost only
    2 n w / blocks operations a token to rebuild; for values, and latent keys, there is one block.

    Args:
        covariance: of x over tokens, [n, n].
        metric: [n, n].
        blocks: features of each block, a partition of 0 … n − 1; None for one block of all.

    Returns: n components, block after block, the largest energy of each block first.
    """
    n = len(covariance)
    features, gauges = [], []
    for index in blocks or [torch.arange(n)]:
        index = index.to(covariance.device)
        values, vectors = torch.linalg.eigh(metric[index][:, index])
        values = values.clamp_min(1e-6 * values.mean())
        root, inverse = ((vectors * values**power) @ vectors.mT for power in (0.5, -0.5))
        basis = torch.linalg.eigh(root @ covariance[index][:, index] @ root)[1].flip(-1)
        feature = covariance.new_zeros(len(index), n)
        gauge = covariance.new_zeros(n, len(index))
        feature[:, index], gauge[index] = basis.mT @ root, inverse @ basis
        features.append(feature)
        gauges.append(gauge)
    feature, gauge = torch.cat(features), torch.cat(gauges, dim=1)
    norm = torch.linalg.vector_norm(gauge, dim=0)
    return Components(feature * norm[:, None], gauge / norm, norm**-2)


def prediction(parent: Tensor, child: Tensor, ridge: float = 0.01) -> Tensor:
    """P of the best child ≈ parent · P + constant: what a token's coded keys say of its values.

    Keys and values of a token are functions of one input. Coding the values' residual v − k̂ P, with
    k̂ the *decoded* components of the keys, is predictive coding in closed loop: the decoder knows
    k̂, so that no error adds up. Attention pays for it by summing the keys' components beside the
    values' (Σ_t p_t k̂_t), which they have to be cached unrotated for.

    Args:
        parent: decoded components of tokens that are no sinks, [N, w].
        child: numbers of the other part, [N, n].
        ridge: damping, relative to the mean diagonal of the parent's second moment.

    Returns: fp64 [w, n].
    """
    parent, child = (x.double() - x.double().mean(0) for x in (parent, child))
    gram = parent.mT @ parent
    damping = ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    return torch.linalg.solve(gram + damping, parent.mT @ child)
