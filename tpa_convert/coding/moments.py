"""What is known of the keys and values of a layer before they are coded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheMoments:
    """Of one layer, with n = g d keys and n values a token.

    Keys are those that `AttentionWeights.key` makes, before norm and rotation. Sinks are the first
    tokens of the texts; all else is about the others.

    Args:
        mean: of keys and values together, [2 n].
        covariance: of both together, [2 n, 2 n].
        key_metric, value_metric: E[g gᵀ] of `components.fisher_metric`, [n, n].
        sink_mean: of the sinks, [2 n].
        key_size: weights of the keys' norm that are in the keys, [n]; ones without a norm.
    """

    complex_fields: ClassVar[tuple[str, ...]] = ()

    mean: Tensor
    covariance: Tensor
    key_metric: Tensor
    value_metric: Tensor
    sink_mean: Tensor
    key_size: Tensor

    def to(self, device: torch.device | str) -> CacheMoments:
        """The same there, fp64."""
        # The type last: a GPU gets half the bytes of what is kept in fp32.
        return CacheMoments(
            *(getattr(self, field.name).to(device).double() for field in fields(self))
        )
