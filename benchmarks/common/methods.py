"""The ways to shrink a cache that comparison.py compares, each made at a share of the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common import baselines
from common.decoding import with_quantised_cache
from common.layer_statistics import collect, layer_weights
from common.models import coded_model, source_heads
from common.other_caches import other_cache
from tpa_convert.calibration.cache_moments import collect_cache_moments
from tpa_convert.calibration.moments import Moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.decomposition import AttentionWeights
from tpa_convert.errors import UserError
from tpa_convert.export.save import load_converted
from tpa_convert.plans import Budget, plan_uniform
from tpa_convert.refinement.least_squares import refit
from tpa_convert.sources import Source
from tpa_convert.sources.attention import head_order

OURS, HEALED = "tpa-convert, no training", "tpa-convert, healed"

Made = tuple[PreTrainedModel, float]
"""A model, and the numbers of 16 bits that it caches a token and layer."""


class Method(NamedTuple):
    """A way to shrink the cache.

    Attributes:
        share: of the source's bytes, percent, that is asked for.
        make: raises UserError where it cannot be done on this model.
        decoding: of what is made, the model that decodes with such a cache; None if there is none,
            because the cache is only simulated.
    """

    name: str
    share: float
    make: Callable[[], Made]
    decoding: Callable[[PreTrainedModel], PreTrainedModel] | None = None


@dataclass
class Comparison:
    """What every method works on."""

    source: Source
    blocks: Tensor
    refit_blocks: Tensor

    @cached_property
    def numbers(self) -> int:
        """That the source caches a token and layer."""
        return 2 * source_heads(self.source)

    @cached_property
    def cache_moments(self) -> Moments:
        """For coded caches."""
        return collect_cache_moments(self.source, self.blocks)

    @cached_property
    def moments(self) -> Moments:
        """For plain numbers, and for the baselines."""
        return collect(self.source, self.blocks)

    @cached_property
    def weights(self) -> list[AttentionWeights]:
        """Of every layer of the source."""
        return layer_weights(self.source)

    def methods(self, shares: Sequence[float], healed: Mapping[str, str]) -> Iterator[Method]:
        """All of them, by falling bytes."""
        for bits in (8, 4, 3, 2):
            share, make = 100 * (bits + 1) / 16, partial(self.other, f"int{bits}")
            yield Method("KIVI's kind", share, make, partial(self.quantised, bits))
        for bits in (4, 3, 2):
            make = partial(self.other, f"rotated{bits}")
            yield Method("TurboQuant's kind", 100 * bits / 16, make)
        for share in shares:
            yield Method(OURS, share, partial(self.coded, share), itself)
            yield Method(f"{OURS}, refit", share, partial(self.refitted, share), itself)
            yield Method("KVTC's kind", share, partial(self.other, f"transform{share:g}"))
            floats = round(share / 100 * self.numbers)
            for name, make_of, decoding in (
                ("low rank (Palu, CARE)", partial(self.low, baselines.whitened_joint_svd), None),
                ("one latent (MLA, TransMLA)", partial(self.low, baselines.joint_latent), None),
                ("fewer heads, aligned (GQA)", self.fewer_heads, None),
                ("TPA of the paper (linear)", partial(self.plain, form="linear"), itself),
                ("tpa-convert, 16 bits", partial(self.plain, key_cache="latent"), itself),
            ):
                yield Method(name, share, partial(make_of, floats), decoding)
        for given, directory in healed.items():
            make = partial(self.saved, directory, float(given))
            yield Method(HEALED, float(given), make, itself)

    def other(self, method: str) -> Made:
        """The source with its own cache coded by a method of common/other_caches.py."""
        return other_cache(self.source, self.cache_moments, method)

    def quantised(self, bits: int, model: PreTrainedModel) -> PreTrainedModel:
        """The source with transformers' quantised cache, in the place of a simulated one."""
        return with_quantised_cache(self.source.model, bits)

    def coded(self, share: float) -> Made:
        """Bits for components where they matter, without training."""
        return coded_model(self.source, self.cache_moments, f"{share:g}")

    def refitted(self, share: float) -> Made:
        """The same with output projections fitted to it."""
        model, floats = self.coded(share)
        refit(self.source.model, model, self.refit_blocks)
        return model, floats

    def low(self, change: baselines.Change, floats: int) -> Made:
        """Fewer numbers for all heads together."""
        return self.changed(change, floats // 2, floats // 2), floats

    def fewer_heads(self, floats: int) -> Made:
        """Whole heads, as many as fit."""
        head_dim = self.source.family.attention_sizes(self.source.model.config)["head_dim"]
        width = floats // 2 // head_dim * head_dim
        if not width:
            raise UserError("less than one head of keys and one of values")
        return self.changed(baselines.aligned_pooled, width, width), 2 * width

    def plain(self, floats: int, **settings: Any) -> Made:
        """A conversion to fewer numbers of 16 bits."""
        sizes = self.source.family.attention_sizes(self.source.model.config)
        plan = plan_uniform(sizes, Budget(kv_floats=floats), **settings)
        return convert_model(self.source, plan, self.moments), plan.kv_floats

    def saved(self, directory: str, share: float) -> Made:
        """A converted model of a directory."""
        model, _ = load_converted(directory, dtype=torch.float32)
        return model, share / 100 * self.numbers

    def changed(self, change: baselines.Change, width_k: int, width_v: int) -> PreTrainedModel:
        """The source with the weights that `change` makes of every layer."""
        names, config = self.source.family.names, self.source.model.config
        layers = self.source.model.get_decoder().layers
        for i, layer in enumerate(layers):
            if head_order(getattr(layer, names.attention), names, config, i) is not None:
                raise UserError("its rotary pairs do not lie as a Llama's do")
        moments = self.moments.layers
        return baselines.changed(self.source.model, change, self.weights, moments, width_k, width_v)


def itself(model: PreTrainedModel) -> PreTrainedModel:
    """Of a model whose cache is as small as its row says."""
    return model
