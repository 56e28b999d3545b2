"""What others do to a cache's bits, beside the package: rotations and principal components.

Each gives a model that attends to what its cache would hold, in passes over full blocks; what is
cached is stated by each function. `tpa_convert.forward.quantised` is KIVI's kind.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tpa_convert.calibration.moments import Moments
from tpa_convert.coding import CacheMoments
from tpa_convert.conversion.coded import choose_codes
from tpa_convert.conversion.model import convert_model
from tpa_convert.forward.passes import causal_attention
from tpa_convert.plans import Budget, plan_coded
from tpa_convert.sources import Source

# ------------------------------------------------------------------------------- rotations

NAME = "benchmark_rotated_{}"
SAMPLE = 100_000  # of the normal distribution, for levels of least error


def rotated_share(bits: int, head_dim: int) -> float:
    """Of 16 bits a number: the codes, and a norm of 16 bits a head and token."""
    return (bits + 16 / head_dim) / 16


@cache
def normal_levels(bits: int, rounds: int = 100) -> Tensor:
    """The 2^bits values that a standard normal number is best rounded to (Lloyd, Max), [2^bits]."""
    points = torch.special.ndtri((torch.arange(SAMPLE, dtype=torch.float64) + 0.5) / SAMPLE)
    levels = points[SAMPLE // 2**bits // 2 :: SAMPLE // 2**bits].clone()[: 2**bits]
    for _ in range(rounds):
        nearest = torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)
        sums = torch.zeros_like(levels).index_add_(0, nearest, points)
        levels = sums / nearest.bincount(minlength=len(levels))
    return levels


@cache
def rotation(size: int) -> Tensor:
    """A random orthogonal matrix, [size, size], fp64; always the same of a size."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(noise)
    return q * r.diagonal().sign()


def rotate_and_round(x: Tensor, bits: int) -> Tensor:
    """Vectors [..., d] whose rotated coordinates are rounded to the levels of a normal number, with
    the norm of each vector kept."""
    turn = rotation(x.shape[-1]).to(x)
    scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    levels = normal_levels(bits).to(x)
    codes = torch.bucketize((x @ turn / scale.clamp_min(1e-12)), (levels[1:] + levels[:-1]) / 2)
    return levels[codes] * scale @ turn.mT


def rotated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    bits: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    key, value = rotate_and_round(key, bits), rotate_and_round(value, bits)
    return causal_attention(module, query, key, value, *args, **kwargs)


def rotated_source(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """TurboQuant's kind (arXiv 2504.19874): every key and value of a head is rotated at random, and
    each coordinate rounded to `bits` bits; without its correction of the inner product."""
    tensors = [*model.parameters(), *model.buffers()]
    other = copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
    AttentionInterface.register(NAME.format(bits), partial(rotated_attention, bits=bits))
    other.set_attn_implementation(NAME.format(bits))
    return other


# ------------------------------------------------------------------------------- components


def principal(layer: CacheMoments) -> CacheMoments:
    """Moments as if every error of the keys cost the same, and every error of the values, and both
    as much relative to how they vary."""
    keys, values = layer.covariance.diagonal().chunk(2)
    identity = torch.eye(len(keys), dtype=keys.dtype)
    return replace(layer, key_metric=identity / keys.sum(), value_metric=identity / values.sum())


def principal_source(
    source: Source, moments: Moments, share: float
) -> tuple[PreTrainedModel, float]:
    """KVTC's kind (arXiv 2511.01815): principal components over all heads, before rotation, with
    bits by their variances in closed form; the first tokens have a mean and steps of their own,
    where KVTC keeps them exact. Without its entropy coder, for which all that is attended to has to
    be decompressed first.

    Returns: the model; its numbers of 16 bits a token and layer.
    """
    layers: Sequence[CacheMoments] = [principal(layer) for layer in moments.layers]
    sizes = source.family.attention_sizes(source.model.config)
    plan = plan_coded(sizes, Budget(kv_ratio=share), key_blocks=1)
    assert plan.coded is not None
    plan = replace(plan, coded=replace(plan.coded, predict_values=False))
    plain = replace(moments, layers=layers)
    codes = choose_codes(plan, layers, moments.num_tokens)
    return convert_model(source, codes.plan, plain), codes.plan.kv_floats
