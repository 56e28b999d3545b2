"""Logits a few positions at a time: whole batches of vocabulary-sized rows never exist at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.forward.head import final_hidden_states, logit_finish

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

    The features are what the output head sees. A model without such a head has its logits as
    features.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or head is None or decoder is model:
        return lambda ids: model(input_ids=ids, use_cache=False).logits, _at_least_fp32
    with torch.inference_mode():
        finish = logit_finish(model)

    def logits(features: Tensor) -> Tensor:
        product = F.linear(features, head.weight)
        return _at_least_fp32(product if finish is None else finish(product))

    return lambda ids: final_hidden_states(model, ids), logits
