"""Bytes of the key-value cache, measured on the live cache after a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.errors import UserError
from tpa_convert.forward.cached import cache_of


@dataclass(frozen=True)
class CacheBytes:
    """What a model keeps of each token.

    Attributes:
        per_layer: bytes per token in each layer, keys and values.
        numbers: cached numbers per token, all layers; codes of bits are not among them.
        code_bytes: bytes of codes per token, all layers.
    """

    per_layer: tuple[float, ...]
    numbers: float
    code_bytes: float

    @property
    def per_token(self) -> float:
        """Bytes per token, all layers."""
        return sum(self.per_layer)

    def at(self, itemsize: int) -> float:
        """Bytes per token, all layers, with numbers of so many bytes."""
        return self.code_bytes + itemsize * self.numbers


@torch.inference_mode()
def cache_bytes(model: PreTrainedModel, tokens: int = 128) -> CacheBytes:
    """Run `tokens` tokens through the model and measure the tensors its cache then holds.

    Raises:
        UserError: the model keeps no cache of keys and values.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(tokens, device=model.device) % vocabulary)[None]
    cache = cache_of(model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1))
    layers: list[list[Tensor]] = [
        [t for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
        for layer in getattr(cache, "layers", [])
    ]
    if not any(layers):
        raise UserError(f"{type(model).__name__} keeps no key-value cache that could be measured")
    tensors = [t for layer in layers for t in layer]
    return CacheBytes(
        per_layer=tuple(sum(t.nbytes for t in layer) / tokens for layer in layers),
        numbers=sum(t.numel() for t in tensors if t.is_floating_point()) / tokens,
        code_bytes=sum(t.nbytes for t in tensors if not t.is_floating_point()) / tokens,
    )
