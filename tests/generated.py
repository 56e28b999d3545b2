"""Generated text that a comparison may rest on.

A random model may repeat one token whatever it has read, or follow the last token alone: then every
way to generate agrees with every other, one that has lost its cache included. `telling` refuses
such models, and what it returns is a reference.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

DISTINCT = 4  # tokens that every continuation has at least
CHANGED = 4  # places where it differs after another beginning that ends in the same token
SPECIAL = 3  # ids below are special tokens, as in the tiny models


def generated(model: PreTrainedModel, tokens: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """What follows each prompt, [B, new_tokens]: greedy by default, and with the same random draws
    at every call."""
    torch.manual_seed(0)
    options = {"do_sample": False, **options}
    return model.generate(tokens, max_new_tokens=new_tokens, **options)[:, tokens.shape[1] :]


def telling(model: PreTrainedModel, tokens: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """`generated`, where it varies and depends on more than the last token of a prompt."""
    found = generated(model, tokens, new_tokens, **options)
    other = with_another_beginning(tokens, model.config.vocab_size, options.get("attention_mask"))
    check_telling(found, generated(model, other, new_tokens, **options))
    return found


def with_another_beginning(tokens: Tensor, vocab_size: int, mask: Tensor | None = None) -> Tensor:
    """Other prompts of the same lengths and padding, with the same last tokens."""
    shifted = SPECIAL + (tokens - SPECIAL + 1) % (vocab_size - SPECIAL)
    changes = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    changes = changes.clone()
    changes[:, -1] = False
    return torch.where(changes, shifted, tokens)


def check_telling(found: Tensor, elsewhere: Tensor) -> None:
    """Fails where equality with `found` would say little.

    Args:
        elsewhere: what follows other prompts with the same last tokens.
    """
    for row, other in zip(found, elsewhere, strict=True):
        distinct, changed = len(row.unique()), int((row != other).sum())
        assert distinct >= DISTINCT, f"the text repeats itself: {row.tolist()}"
        assert changed >= CHANGED, f"the text hardly depends on its beginning: {row.tolist()}"


def make_caches_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has dynamic caches lose the values of all tokens but those of the current step, which a
    comparison of generated text has to notice."""
    update = DynamicLayer.update

    def forgetful(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        all_keys, all_values = update(self, keys, values, *args, **kwargs)
        all_values = all_values.clone()
        all_values[..., : -values.shape[-2], :] = 0
        return all_keys, all_values

    monkeypatch.setattr(DynamicLayer, "update", forgetful)
