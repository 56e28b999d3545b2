"""How fast a model decodes beside its source, with the cache that it really has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, QuantizedCache

from common.other_caches import sharing_copy
from tpa_convert.errors import UserError
from tpa_convert.evaluation.metrics.speed import SpeedSettings, measure_speed
from tpa_convert.forward.cached import cache_name
from tpa_convert.modeling import given_cache


def with_quantised_cache(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A model that decodes with transformers' own quantised cache, HQQ's with its defaults: 128
    recent tokens stay exact. It shares its weights.

    Raises: UserError where hqq is not installed.
    """
    if find_spec("hqq") is None:
        raise UserError("needs hqq")

    def give_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if kwargs.get("use_cache") and given_cache(kwargs) is None:
            kwargs[cache_name(model)] = QuantizedCache("hqq", model.config, nbits=bits)
        return args, kwargs

    other = sharing_copy(model)
    other.register_forward_pre_hook(give_cache, with_kwargs=True)
    return other


def relative_speed(
    source: PreTrainedModel,
    model: PreTrainedModel,
    batches: Sequence[int],
    context: int,
    new_tokens: int = 32,
) -> list[float]:
    """Tokens that a model decodes a second after so many of context, over those of its source, for
    each batch. Both run by turns with dynamic caches, in 16 bits on a GPU."""
    models = {"source": source, "model": model}
    if source.device.type == "cuda":
        models = {name: copy.deepcopy(one).to(torch.bfloat16) for name, one in models.items()}
    found = []
    for batch in batches:
        settings = SpeedSettings(batch, context, new_tokens, repeats=7)
        speeds = measure_speed(models, settings)
        found.append(speeds["model"].decode / speeds["source"].decode)
    return found
