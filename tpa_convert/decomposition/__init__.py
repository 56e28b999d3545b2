"""Pure functions on tensors: moments and weights in, TPA factors out. No model, no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tpa_convert.decomposition import gauge, tensor
from tpa_convert.decomposition.factors import (
    AttentionWeights,
    HeadNorm,
    KeyFactors,
    LatentKeyFactors,
    ValueFactors,
)
from tpa_convert.decomposition.latent import decompose_latent_keys
from tpa_convert.decomposition.moments import DataFreeMoments, LayerMoments


class Method(NamedTuple):
    """A way to factors; `whole_heads` if widths must be multiples of the head dim."""

    decompose_keys: Callable[..., KeyFactors]
    decompose_values: Callable[..., ValueFactors]
    whole_heads: bool = False


METHODS = {
    "gauge": Method(gauge.decompose_keys, gauge.decompose_values),
    "svd": Method(tensor.decompose_keys_svd, tensor.decompose_values_svd, whole_heads=True),
    "tucker": Method(tensor.decompose_keys_tucker, tensor.decompose_values_tucker),
    "cp": Method(tensor.decompose_keys_cp, tensor.decompose_values_cp),
}

__all__ = [
    "METHODS",
    "AttentionWeights",
    "DataFreeMoments",
    "HeadNorm",
    "KeyFactors",
    "LatentKeyFactors",
    "LayerMoments",
    "Method",
    "ValueFactors",
    "decompose_latent_keys",
]
