"""What the ablation knows of each layer: its weights, and more moments than the package needs.

Letters as in `tpa_convert.decomposition.factors`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tpa_convert.calibration import moments as package
from tpa_convert.decomposition import AttentionWeights, LayerMoments
from tpa_convert.decomposition.factors import to_complex_pairs
from tpa_convert.sources import Source
from tpa_convert.sources.attention import attention_weights


@dataclass(frozen=True)
class Statistics(LayerMoments):
    """`LayerMoments` and, for the homogeneous attention input x (with a 1 at its end):

    Attributes:
        input_equal: E[x xᵀ], every token alike, [D + 1, D + 1].
        input_weighted: tokens weighted by attention, not centred, [D + 1, D + 1].
        value_mean: E[z] of the attention-mixed values, [g d].
        head_pair_covariance: `pair_covariance` under each query head's own attention,
            [h, f, g, g].
        head_query_energy: E|q_{i,f}|², [h, f].
    """

    complex_fields = ("pair_covariance", "head_pair_covariance")

    input_equal: Tensor
    input_weighted: Tensor
    value_mean: Tensor
    head_pair_covariance: Tensor
    head_query_energy: Tensor


class StatisticsAccumulator(package.MomentAccumulator):
    """Sums what `Statistics` holds."""

    kind: type[LayerMoments] = Statistics

    def add_all(
        self,
        inputs: Tensor,
        query_pairs: Tensor,
        key_pairs: Tensor,
        key: Tensor,
        scale: Tensor,
        value: Tensor,
        attention: Tensor,
    ) -> None:
        super().add_all(inputs, query_pairs, key_pairs, key, scale, value, attention)
        self.add("head_query_energy", query_pairs.abs().square().sum((0, 2)))
        for head, p in enumerate(attention.unbind(1)):
            weight = p.sum(1)[..., None, None]
            mean = torch.einsum("bst,btgf->bsgf", p.to(key_pairs.dtype), key_pairs)
            covariance = package.covariance_of_pairs(key_pairs, weight * key_pairs)
            covariance = covariance - package.covariance_of_pairs(mean, mean)
            self.add(f"head_pair_covariance.{head}", covariance)
        self.add("value_mean", (attention @ value[:, None]).mean(1).sum((0, 1)))
        # as many tokens as queries count
        share = attention.shape[2] / attention.shape[3]
        flat = inputs.flatten(0, 1)
        self.add("input_equal", share * (flat.mT @ flat))

    def finish(self) -> LayerMoments:
        heads = [
            self.sums.pop(f"head_pair_covariance.{i}").cpu() / self.queries
            for i in range(self.weights.query.shape[0])
        ]
        extra = {
            name: self.sums.pop(name).cpu() / self.queries
            for name in ("input_equal", "value_mean", "head_query_energy")
        }
        weighted = self.sums["input_moment"].cpu() / self.queries
        layer = super().finish()
        base = {field.name: getattr(layer, field.name) for field in fields(LayerMoments)}
        return Statistics(
            **base, **extra, input_weighted=weighted, head_pair_covariance=torch.stack(heads)
        )


@contextmanager
def all_statistics() -> Iterator[None]:
    """Makes `collect_moments` collect `Statistics`."""
    with patch.object(package, "MomentAccumulator", StatisticsAccumulator):
        yield


def collect(source: Source, blocks: Tensor, **settings: Any) -> package.Moments:
    """`collect_moments` whose layers are `Statistics`."""
    with all_statistics():
        return package.collect_moments(source, blocks, **settings)


def layer_weights(source: Source) -> list[AttentionWeights]:
    """Of every layer, float64, on the CPU as moments are."""
    names, config = source.family.names, source.model.config
    layers = source.model.get_decoder().layers
    attentions = (copy.deepcopy(getattr(layer, names.attention)).cpu() for layer in layers)
    return [attention_weights(module, names, config, i) for i, module in enumerate(attentions)]


def of_inputs(
    weights: AttentionWeights, statistics: Statistics, second_moment: Tensor
) -> Statistics:
    """Moments as if keys and values were seen with this second moment of the inputs, uncentred."""
    pairs = to_complex_pairs(weights.key, 1)
    moment = second_moment.to(pairs.dtype)
    key, value = weights.key.flatten(0, 1), weights.value.flatten(0, 1)
    return replace(
        statistics,
        pair_covariance=torch.einsum("gfx,xy,hfy->fgh", pairs, moment, pairs.conj()),
        key_covariance=key @ second_moment @ key.mT,
        value_covariance=value @ second_moment @ value.mT,
    )
