"""The cache in a model's output, whatever the installed transformers calls it."""

from __future__ import annotations

from inspect import signature
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before


def cache_of(output: ModelOutput) -> Cache | None:
    """What the model has cached, None if nothing."""
    return next(iter(cache_argument(output).values()), None)


def cache_name(model: PreTrainedModel) -> str:
    """What the model, and `generate`, call the cache that they are given."""
    known = signature(model.forward).parameters
    return next(name for name in NAMES if name in known)


def cache_argument(output: ModelOutput) -> dict[str, Any]:
    """The keyword argument that gives the cache to the next forward pass; none without a cache."""
    # An output's keys are the names it was made with; the other name would be a deprecated alias.
    return next(({name: output[name]} for name in NAMES if name in output), {})
