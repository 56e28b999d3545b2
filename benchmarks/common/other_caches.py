"""The source with its own cache coded by other methods, as rows beside a coded conversion.

Named by method and size: `int4` is KIVI's kind (keys by channel, values by token, 4 bits);
`rotated3` rotates every head at random and codes its direction in 3 bits a number, as TurboQuant
does (arXiv 2504.19874); `transform12.5` codes principal components over all heads of a layer in
12.5 % of the bytes, as KVTC does before its entropy coder (arXiv 2511.01815). Models attend to what
their cache would hold, in passes over full blocks without a cache.
"""

from __future__ import annotations

import copy
import re
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tpa_convert.calibration.moments import Moments
from tpa_convert.coding import allocate_bits
from tpa_convert.coding.allocation import GAUSSIAN_STEP
from tpa_convert.forward.passes import causal_attention
from tpa_convert.forward.quantised import quantised_source, share_of_bytes
from tpa_convert.sources import Source

SINKS = 4  # first tokens that KVTC leaves exact, outside the counted bytes
NORM_BITS = 16  # of the length of a head


def other_cache(source: Source, moments: Moments, name: str) -> tuple[PreTrainedModel, float]:
    """The source with another cache, and the numbers of 16 bits that a token and layer takes.

    Args:
        moments: of the kind for coded caches.
        name: a method and its size.
    """
    found = re.fullmatch(r"(int|rotated|transform)([\d.]+)", name)
    if found is None:
        raise SystemExit(f"{name} is no other cache: int4, rotated3 and transform12.5 are")
    method, size = found[1], float(found[2])
    sizes = source.family.attention_sizes(source.model.config)
    numbers = 2 * sizes["num_key_value_heads"] * sizes["head_dim"]
    if method == "int":
        return quantised_source(source.model, int(size)), numbers * share_of_bytes(int(size))
    if method == "rotated":
        share = (size + NORM_BITS / sizes["head_dim"]) / 16
        return rotated_source(source.model, int(size)), numbers * share
    return transformed_source(source, moments, size / 100)


# --------------------------------------------------------------------------- a random rotation


@lru_cache
def lloyd_max(bits: int) -> Tensor:
    """The 2^bits values that stand for a number of a Gaussian with the least squared error
    (Max, "Quantizing for minimum distortion", 1960), ascending."""
    count = 2**16
    x = torch.special.ndtri((torch.arange(count).double() + 0.5) / count)
    levels = torch.special.ndtri((torch.arange(2**bits).double() + 0.5) / 2**bits)
    for _ in range(500):
        label = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        sums = torch.zeros_like(levels).index_add(0, label, x)
        levels = sums / label.bincount(minlength=len(levels)).clamp_min(1)
    return levels


@lru_cache
def rotation(size: int) -> Tensor:
    """A random orthogonal matrix, always the same, [size, size]."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.double, generator=generator))[0]


def rotated_codes(heads: Tensor, bits: int) -> Tensor:
    """What codes of so many bits a number say of heads [..., d], after their length in 16 bits."""
    size = heads.shape[-1]
    turn, levels = rotation(size).to(heads), lloyd_max(bits).to(heads)
    length = heads.norm(dim=-1, keepdim=True)
    direction = heads @ turn * (size**0.5 / length.clamp_min(torch.finfo(heads.dtype).tiny))
    label = torch.bucketize(direction.contiguous(), (levels[1:] + levels[:-1]) / 2)
    return levels[label] @ turn.mT * (length.bfloat16().to(heads) / size**0.5)


def rotated_source(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A model whose rotated keys and values are coded so. It shares its weights."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        coded = rotated_codes(key, bits), rotated_codes(value, bits)
        return causal_attention(module, query, *coded, *args, **kwargs)

    name = f"benchmark_rotated_{bits}"
    AttentionInterface.register(name, attention)
    other = sharing_copy(model)
    other.set_attn_implementation(name)
    return other


# --------------------------------------------------------------- principal components over heads


class Transform(NamedTuple):
    """Components of the keys or the values of one layer, and their quantisers.

    Attributes:
        mean: [n].
        basis: orthonormal columns, [n, n].
        step: [n].
        bits: int64 [n].
    """

    mean: Tensor
    basis: Tensor
    step: Tensor
    bits: Tensor

    def __call__(self, numbers: Tensor) -> Tensor:
        """What the codes of numbers [b, t, n] say of them, but for the first tokens."""
        mean, basis, step = (x.to(numbers) for x in self[:3])
        highest = (2.0 ** self.bits.to(step) - 1) / 2
        scaled = (numbers - mean) @ basis / step
        coded = (scaled.floor() + 0.5).clamp(-highest, highest) * (self.bits > 0).to(step)
        found = coded * step @ basis.mT + mean
        return torch.cat((numbers[:, :SINKS], found[:, SINKS:]), dim=1)


def transforms(parts: list[tuple[Tensor, Tensor]], budget: int) -> list[Transform]:
    """Of the means [n] and covariances [n, n] of one part of every layer.

    Args:
        budget: bits of one token in all layers. They go where they take most of the squared error
            away, one by one, which is what dynamic programming over free levels finds.
    """
    found = [torch.linalg.eigh(covariance) for _, covariance in parts]
    energies = [values.clamp_min(1e-12) for values, _ in found]
    levels = range(len(GAUSSIAN_STEP))
    bits = allocate_bits(torch.cat(energies), budget, levels).split([len(e) for e in energies])
    steps = torch.tensor(GAUSSIAN_STEP, dtype=torch.double)
    return [
        Transform(mean, basis, steps[n] * energy.sqrt(), n)
        for (mean, _), (_, basis), energy, n in zip(parts, found, energies, bits, strict=True)
    ]


def transformed_source(
    source: Source, moments: Moments, share: float
) -> tuple[PreTrainedModel, float]:
    """A model whose keys before rotation and values are coded so, half of the bits to each, and
    the numbers of 16 bits that a token and layer takes. It shares its weights."""
    names, layers = source.family.names, moments.layers
    n = len(layers[0].mean) // 2
    budget = int(16 * n * share * len(layers))
    model, bits = sharing_copy(source.model), 0
    decoder: Any = model.get_decoder()
    for name, part in ((names.key, slice(None, n)), (names.value, slice(n, None))):
        parts = [(layer.mean[part], layer.covariance[part, part]) for layer in layers]
        for layer, transform in zip(decoder.layers, transforms(parts, budget), strict=True):
            projection = getattr(getattr(layer, names.attention), name)
            projection.register_forward_hook(partial(_replaced, transform))
            bits += int(transform.bits.sum())
    return model, bits / (16 * len(layers))


def _replaced(change: Transform, *call: Any) -> Tensor:
    """A forward hook: what a module gives, changed."""
    return change(call[-1])


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
