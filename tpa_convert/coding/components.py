"""Components to be coded: the transform, and what an error of each component costs.

The keys (or values) of a token in one layer are n = g d numbers x. A *metric* G says what an error
of them costs: δᵀ G δ. In the coordinates G^½ x all errors count alike, so that the best transform
is the Karhunen–Loève basis there, and a component costs its energy, importance · variance.

The metric is the Fisher information. With g the gradient of −log p(y | text), y drawn from the
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

TOKENS_A_DIMENSION = 5  # that a prior counts as, in `fisher_metric`


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


def fisher_metric(moment: Tensor, tokens: int, size: Tensor | None = None) -> Tensor:
    """G = E[g gᵀ] (1), shrunk towards a metric in which errors of all numbers cost alike, with the
    same trace: directions in which few gradients happened to point may still not take any error.

    Args:
        moment: mean of g gᵀ over tokens, with g the gradient of −log p of labels drawn from the
            model, summed over positions, [n, n]. Sinks are to be left out: attention to them is of
            another size, and they are coded apart.
        tokens: how many.
        size: what each number was multiplied with, and its gradient divided by, [n]: errors cost
            alike, and the trace is the same, without it. Keys have the weights of their norm in
            them, some of which are next to zero.

    Returns: [n, n].
    """
    share = min(0.5, TOKENS_A_DIMENSION * len(moment) / max(1, tokens))
    square = torch.ones_like(moment[0]) if size is None else size.to(moment).square()
    prior = (moment.diagonal() * square).mean() / square
    return (1 - share) * moment + share * prior.diag()


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
        blocks: features of each block, all of one size, a partition of 0 … n − 1; None for one
            block of all.

    Returns: n components, block after block, the largest energy of each block first.
    """
    n = len(covariance)
    index, root, inside = _blockwise(covariance, metric, blocks)
    basis = torch.linalg.eigh(inside)[1].flip(-1)  # [B, m, m]
    feature = covariance.new_zeros(*index.shape, n)
    gauge = covariance.new_zeros(*index.shape, n)
    columns = index[:, None].expand_as(basis)
    feature.scatter_(2, columns, basis.mT @ root)
    gauge.scatter_(2, columns, torch.linalg.solve_triangular(root, basis, upper=True).mT)
    feature, gauge = feature.flatten(0, 1), gauge.flatten(0, 1)
    norm = torch.linalg.vector_norm(gauge, dim=1)
    return Components(feature * norm[:, None], (gauge / norm[:, None]).mT, norm**-2)


def component_energies(
    covariance: Tensor, metric: Tensor, blocks: list[Tensor] | None = None
) -> list[Tensor]:
    """What leaving out each of the `principal_components` would cost, by block, the largest first:
    a fraction of the time that the components take."""
    _, _, inside = _blockwise(covariance, metric, blocks)
    return list(torch.linalg.eigvalsh(inside).flip(-1).clamp_min(0))


def _blockwise(
    covariance: Tensor, metric: Tensor, blocks: list[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of each of B blocks, int64 [B, m]; S with Sᵀ S = G there, upper triangular; and
    the covariance of S x, whose eigenvectors are the basis whatever root S is. [B, m, m] each."""
    whole = [torch.arange(len(covariance))]
    index = torch.stack(blocks or whole).to(covariance.device)
    rows, columns = index[:, :, None], index[:, None, :]
    metric = metric[rows, columns]
    # above 0 also where no error costs anything, as behind projections that are zero
    floor = (1e-12 * metric.diagonal(dim1=-2, dim2=-1)).clamp_min(1e-30)
    root = torch.linalg.cholesky(metric + torch.diag_embed(floor)).mT
    return index, root, root @ covariance[rows, columns] @ root.mT
