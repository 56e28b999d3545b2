"""Decoding over latent keys, in plain PyTorch: the truth that the kernel is tested on.

Keys are rebuilt from what is cached, normalised if the source does that, and rotated; values are
mixed as they are. Letters are those of `reference`, and

    g  key/value heads                d  head dim, d = 2 f rotary pairs
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference


class LatentKeys(NamedTuple):
    """How keys come out of what is cached.

    Attributes:
        weight: [g, d, w_k]; the real parts of all pairs come first, then the imaginary ones.
        offset: [g, d].
        cosine, sine: of the position of each slot, [b or 1, t, f].
        unscale: what keys are taken times before their root mean square is found, [d]; None for
            keys without a norm.
        gain: what normalised keys are taken times, [d].
        epsilon: added to the mean square.
    """

    weight: Tensor
    offset: Tensor
    cosine: Tensor
    sine: Tensor
    unscale: Tensor | None = None
    gain: Tensor | None = None
    epsilon: float = 0.0

    def rebuild(self, cached: Tensor) -> Tensor:
        """Rotated keys [b, g, t, d] of what is cached [b, 1, t, w_k], in its type."""
        weight, offset, cosine, sine = (x.to(cached.dtype) for x in self[:4])
        keys = cached @ weight.mT + offset[:, None]
        if self.unscale is not None and self.gain is not None:
            size = (keys * self.unscale.to(keys.dtype)).square().mean(-1, keepdim=True)
            keys = keys * (size + self.epsilon).rsqrt() * self.gain.to(keys.dtype)
        real, imaginary = keys.chunk(2, -1)
        cosine, sine = cosine[:, None], sine[:, None]
        return torch.cat(
            (real * cosine - imaginary * sine, imaginary * cosine + real * sine), dim=-1
        )


def decode_latent(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    latent: LatentKeys,
    *,
    scale: float,
    start: Tensor | None = None,
    end: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale · query keys_jᵀ) values, with the keys of the head j that queries share.

    Args:
        query: rotated, [b, h, s, d].
        keys, values: the cache, [b, 1, t, w_k] and [b, 1, t, w_v].
        scale, start, end, window, softcap, mask: see `reference.decode_attention`.

    Returns: [b, h, s, w_v] in the type of `query`; zeros where nothing is attended to.
    """
    attended = reference.attended_slots(
        keys.shape[2], query.shape[2], start, end, window, query.device, mask
    )
    read = attended.any(1)[:, None, :, None]
    rebuilt = latent.rebuild(torch.where(read, keys, 0).to(query.dtype))
    output = [
        reference.decode_attention(
            of_head,
            rebuilt[:, j : j + 1],
            values,
            scale=scale,
            start=start,
            end=end,
            window=window,
            softcap=softcap,
            mask=mask,
        )
        for j, of_head in enumerate(query.chunk(len(latent.weight), 1))
    ]
    return torch.cat(output, 1)
