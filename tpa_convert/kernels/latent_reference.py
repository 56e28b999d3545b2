"""Decoding over latent keys, in plain PyTorch: the truth that the kernels are tested on.

Keys are rebuilt from components, normalised if the source does that, and rotated; components of
values are mixed as they are, and beside them those of the keys where values follow from both.
Letters are those of `reference`, and

    g  key/value heads                d  head dim, d = 2 f rotary pairs
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .latent_tables import KeyMap
from .rows import in_whole_words


def rebuild(components: Tensor, key_class: Tensor | None, key_map: KeyMap) -> Tensor:
    """Keys [b, g, t, d] before rotation, of components [b, t, w] and 1 for tokens [b, t] of the
    second class, in their type."""
    weights = key_map.weight.to(components.dtype).split(list(key_map.widths), -1)
    parts = components.split(list(key_map.widths), -1)
    of_blocks = [torch.einsum("btw,gnw->bgtn", *pair) for pair in zip(parts, weights, strict=True)]
    halves = [torch.cat([x.chunk(2, -1)[i] for x in of_blocks], -1) for i in (0, 1)]
    keys = torch.cat(halves, -1) + key_map.offset.to(components.dtype)[:, None]
    if key_map.of_class is not None and key_class is not None:
        keys = keys + key_map.of_class.to(keys.dtype)[:, None] * key_class[:, None, :, None]
    if key_map.unscale is None or key_map.gain is None:
        return keys
    unscale, gain = (x.to(keys.dtype) for x in (key_map.unscale, key_map.gain))
    if unscale.ndim == 2:
        unscale, gain = unscale[:, None], gain[:, None]
    together = (1, 3) if key_map.together else 3
    size = (keys * unscale).square().mean(together, keepdim=True)
    return keys * (size + key_map.epsilon).rsqrt() * gain


def decode_latent(
    query: Tensor,
    components: tuple[Tensor, Tensor],
    classes: tuple[Tensor, Tensor] | None,
    key_map: KeyMap,
    cosine: Tensor,
    sine: Tensor,
    *,
    predicted: bool,
    scale: float,
    start: Tensor | None = None,
    end: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale · query keys_jᵀ) features, with the keys of the head j that queries share.

    Args:
        query: rotated, [b, h, s, d].
        components: of keys and of values, [b, t, w_k] and [b, t, w_v]; what stands in slots that
            nothing attends to may be anything.
        classes: 1 for tokens of the second class, of keys and of values, [b, t] each.
        cosine, sine: of the position of each slot, [b or 1, t, f].
        predicted: whether key components are mixed too.
        scale, start, end, window, softcap, mask: see `reference.decode_attention`.

    Returns: features as `latent_tables.LatentTables` orders them, [b, h, s, n].
    """
    slots = components[0].shape[1]
    seen = reference.attended_slots(
        slots, query.shape[2], start, end, window, query.device, mask
    ).any(1)
    of_keys, of_values = (torch.where(seen[..., None], x.to(query.dtype), 0) for x in components)
    key_class, value_class = (
        (torch.where(seen, x.to(query.dtype), 0) for x in classes)
        if classes is not None
        else (None, None)
    )
    real, imaginary = rebuild(of_keys, key_class, key_map).chunk(2, -1)
    cos, sin = (x.to(query.dtype)[:, None] for x in (cosine, sine))
    keys = torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), -1)
    features = _with_class(of_values, value_class)
    if predicted:
        features = torch.cat((features, _with_class(of_keys, key_class)), -1)
    mixed = features[:, None]
    output = [
        reference.decode_attention(
            of_head,
            keys[:, j : j + 1],
            mixed,
            scale=scale,
            start=start,
            end=end,
            window=window,
            softcap=softcap,
            mask=mask,
        )
        for j, of_head in enumerate(query.chunk(keys.shape[1], 1))
    ]
    return torch.cat(output, 1)


def _with_class(components: Tensor, classes: Tensor | None) -> Tensor:
    """Components [b, t, w], whether the class is the second one, and zeros, side by side."""
    parts = (components,) if classes is None else (components, classes[..., None])
    return in_whole_words(torch.cat(parts, -1))
