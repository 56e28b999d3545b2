"""Other ways to shrink a KV cache, at equal bytes, as weights that the source itself can run.

Each takes the weights of one layer, its `Statistics` and the two widths, and returns the weights
that stand for the narrowed layer. The source with these weights has the narrowed model's logits;
what it would cache is stated by each function. Letters as in `tpa_convert.decomposition.factors`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.layer_statistics import Statistics
from tpa_convert.decomposition import AttentionWeights
from tpa_convert.decomposition.factors import symmetric_power, to_complex_pairs, to_half_split
from tpa_convert.errors import UserError

Change = Callable[[AttentionWeights, Statistics, int, int], AttentionWeights]


def changed(
    model: PreTrainedModel,
    change: Change,
    weights: Sequence[AttentionWeights],
    statistics: Sequence[Statistics],
    width_k: int,
    width_v: int,
) -> PreTrainedModel:
    """A copy of a Llama with the weights that `change` makes of every layer."""
    layers = [change(w, s, width_k, width_v) for w, s in zip(weights, statistics, strict=True)]
    return model_with(model, layers)


def model_with(model: PreTrainedModel, layers: Sequence[AttentionWeights]) -> PreTrainedModel:
    """A copy of a model with other keys, values and output biases.

    Raises: UserError if its keys and values are not projected as a Llama's are.
    """
    model = copy.deepcopy(model)
    for layer, weights in zip(model.model.layers, layers, strict=True):
        attention = layer.self_attn
        if not (hasattr(attention, "k_proj") and hasattr(attention, "v_proj")):
            raise UserError("it has no projection of keys or values by itself")
        key = weights.key
        if weights.key_norm is not None:  # its weight is folded into the rows, and is the model's
            key = key / weights.key_norm.divisor[..., None]
        for name, tensor in (("k_proj", key), ("v_proj", weights.value)):
            linear = getattr(attention, name)
            flat = tensor.flatten(0, 1).to(linear.weight)
            linear.weight = nn.Parameter(flat[:, :-1].contiguous())
            if linear.bias is not None:
                linear.bias = nn.Parameter(flat[:, -1].contiguous())
        if weights.output_bias is not None:
            bias = weights.output_bias.to(attention.o_proj.weight)
            attention.o_proj.bias = nn.Parameter(bias)
    return model


# ------------------------------------------------------------------------------- pooled heads


def partitions(groups: int, count: int) -> list[list[list[int]]]:
    """All ways to put `groups` heads into `count` non-empty sets."""
    found = []
    for labels in itertools.product(range(count), repeat=groups):
        first = list(dict.fromkeys(labels))
        if first == list(range(count)):
            found.append([[j for j in range(groups) if labels[j] == c] for c in range(count)])
    return found


def best_pooling(heads: Tensor, pooled, count: int) -> Tensor:
    """The pooling of `heads` [g, d, x] into `count` sets with the least error."""
    best, result = torch.inf, heads
    for sets in partitions(len(heads), count):
        candidate = heads.clone()
        for members in sets:
            candidate[members] = pooled(members)
        error = (candidate - heads).square().sum().item()
        if error < best:
            best, result = error, candidate
    return result


def mean_pooled(
    weights: AttentionWeights, statistics: Statistics, width_k: int, width_v: int
) -> AttentionWeights:
    """GQA/MQA by averaging heads (Ainslie et al., arXiv 2305.13245); caches whole heads."""
    head_dim = weights.key.shape[1]
    key = best_pooling(weights.key, lambda j: weights.key[j].mean(0), width_k // head_dim)
    value = best_pooling(weights.value, lambda j: weights.value[j].mean(0), width_v // head_dim)
    return replace(weights, key=key, value=value)


def aligned_pooled(
    weights: AttentionWeights,
    statistics: Statistics,
    width_k: int,
    width_v: int,
    rounds: int = 20,
) -> AttentionWeights:
    """Averaging after rotations that attention cannot see: a phase a rotary pair for keys, an
    orthogonal map for values (generalised Procrustes), on activations.

    Raises: UserError for keys that are normalised head by head, whose mean is not.
    """
    if weights.key_norm is not None:
        raise UserError("keys that are normalised (QK-norm) have no mean over heads")
    head_dim = weights.key.shape[1]
    root = symmetric_power(statistics.input_equal, 0.5)
    inverse = symmetric_power(statistics.input_equal, -0.5)
    key, value = weights.key @ root, weights.value @ root
    pairs = to_complex_pairs(key, 1)

    def pooled_keys(members: list[int]) -> Tensor:
        covariance = torch.einsum("gfx,hfx->fgh", pairs[members], pairs[members].conj())
        phase = torch.linalg.eigh(covariance)[1][..., -1].mT[..., None]  # [g, f, 1]
        phase = phase / phase.abs().clamp_min(1e-12)
        mean = (phase.conj() * pairs[members]).mean(0)
        return to_half_split(phase * mean, 1)

    def pooled_values(members: list[int]) -> Tensor:
        rotations = torch.eye(head_dim, dtype=value.dtype).repeat(len(members), 1, 1)
        for _ in range(rounds):
            mean = (rotations.mT @ value[members]).mean(0)
            left, _, right = torch.linalg.svd(value[members] @ mean.mT)
            rotations = left @ right
        return rotations @ (rotations.mT @ value[members]).mean(0)

    key = best_pooling(key, pooled_keys, width_k // head_dim)
    value = best_pooling(value, pooled_values, width_v // head_dim)
    return replace(weights, key=key @ inverse, value=value @ inverse)


# ------------------------------------------------------------------------------- joint SVD


def projected(heads: Tensor, covariance: Tensor, metric_root: Tensor, width: int) -> Tensor:
    """The best rank-`width` approximation of all heads together [g, d, x].

    Args:
        covariance: of the heads' outputs, [g d, g d].
        metric_root: square root of the metric of their error, [g d, g d].
    """
    weighted = metric_root @ covariance @ metric_root.mT
    vectors = torch.linalg.eigh(weighted)[1][:, -width:]
    projection = torch.linalg.pinv(metric_root) @ vectors @ vectors.mT @ metric_root
    return (projection @ heads.flatten(0, 1)).view_as(heads)


def joint_svd(
    weights: AttentionWeights, statistics: Statistics, width_k: int, width_v: int
) -> AttentionWeights:
    """SVD of the weights over all heads; keys are rebuilt and rotated at every step."""
    key, value = weights.key.flatten(0, 1), weights.value.flatten(0, 1)
    identity = torch.eye(len(key), dtype=key.dtype)
    return replace(
        weights,
        key=projected(weights.key, key @ key.mT, identity, width_k),
        value=projected(weights.value, value @ value.mT, identity, width_v),
    )


def whitened_joint_svd(
    weights: AttentionWeights, statistics: Statistics, width_k: int, width_v: int
) -> AttentionWeights:
    """SVD of the weights whitened by the inputs' second moment, as Palu (arXiv 2407.21118) and CARE
    do; keys are rebuilt and rotated at every step."""
    key, value = weights.key.flatten(0, 1), weights.value.flatten(0, 1)
    moment = statistics.input_equal
    identity = torch.eye(len(key), dtype=key.dtype)
    return replace(
        weights,
        key=projected(weights.key, key @ moment @ key.mT, identity, width_k),
        value=projected(weights.value, value @ moment @ value.mT, identity, width_v),
    )


def joint_latent(
    weights: AttentionWeights, statistics: Statistics, width_k: int, width_v: int
) -> AttentionWeights:
    """One latent for keys and values of all heads together, as MLA caches it (TransMLA, arXiv
    2502.07864), of width_k + width_v numbers; whitened, keys and values balanced by how much they
    vary. Keys are rebuilt and rotated at every step, so that no rotary head is cached beside it."""
    key, value = weights.key.flatten(0, 1), weights.value.flatten(0, 1)
    moment = statistics.input_equal
    sizes = [(part @ moment @ part.mT).trace().sqrt() for part in (key, value)]
    both = torch.cat([part / size for part, size in zip((key, value), sizes, strict=True)])
    covariance = both @ moment @ both.mT
    identity = torch.eye(len(both), dtype=both.dtype)
    narrowed = projected(both[:, None], covariance, identity, width_k + width_v)[:, 0]
    found = [part * size for part, size in zip(narrowed.chunk(2), sizes, strict=True)]
    return replace(
        weights, key=found[0].view_as(weights.key), value=found[1].view_as(weights.value)
    )
