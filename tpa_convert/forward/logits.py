"""Logits a few positions at a time: whole batches of vocabulary-sized rows never exist at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

CHUNK_ELEMENTS = 1 << 24  # logits held at once, per model: 64 MiB in fp32


def chunk_positions(model: PreTrainedModel) -> int:
    """How many positions' logits to compute at once."""
    return max(1, CHUNK_ELEMENTS // model.config.get_text_config().vocab_size)


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def split_head(
    model: PreTrainedModel,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A model as two functions: token ids [b, t] -> features [b, t, ...], features -> fp32 logits.

    The features are the final hidden states, and the second function is the output head. A model
    that changes its logits after the head (soft-capping, scaling) has its logits as features.
    """

    def full(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or head is None or decoder is model:
        return full, _at_least_fp32

    def hidden(ids: Tensor) -> Tensor:
        return decoder(input_ids=ids, use_cache=False).last_hidden_state

    def logits(features: Tensor) -> Tensor:
        return _at_least_fp32(head(features))

    with torch.inference_mode():
        probe = torch.arange(4, device=model.device)[None]
        states = hidden(probe)
        if states.shape[-1] != head.weight.shape[-1]:
            return full, _at_least_fp32
        plain = torch.allclose(logits(states), _at_least_fp32(full(probe)), rtol=1e-2, atol=1e-2)
    return (hidden, logits) if plain else (full, _at_least_fp32)
