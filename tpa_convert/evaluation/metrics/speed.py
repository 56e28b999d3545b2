"""Prefill and decode speed, measured by turns so that a busy machine is unfair to no model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.forward.cached import cache_argument
from tpa_convert.progress import Track, no_tracking


@dataclass(frozen=True)
class Speed:
    """Tokens per second over the whole batch; medians of the repeats.

    Attributes:
        prefill: prompt tokens read per second.
        decode: tokens generated per second, one at a time for each sequence, after the prompt.
    """

    prefill: float
    decode: float


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed: `batch` prompts of `prompt` tokens, then `new_tokens` more for each."""

    batch: int = 1
    prompt: int = 512
    new_tokens: int = 32
    repeats: int = 3


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    settings: SpeedSettings | None = None,
    *,
    track: Track = no_tracking,
) -> dict[str, Speed]:
    """Speed of each model, on the device and in the dtype it has, with the default cache.

    A first round warms up and is not counted. The prompt is shortened where it does not fit into
    a model's context together with the new tokens.
    """
    settings = settings or SpeedSettings()
    prompt = fitting_prompt(models, settings)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repeat in track(range(settings.repeats + 1), "Speed"):
        for name, model in models.items():
            measured = _time_once(model.eval(), settings.batch, prompt, settings.new_tokens)
            if repeat > 0:
                times[name].append(measured)
    return {
        name: Speed(
            prefill=settings.batch * prompt / median(t for t, _ in runs),
            decode=settings.batch * settings.new_tokens / median(t for _, t in runs),
        )
        for name, runs in times.items()
    }


def fitting_prompt(models: Mapping[str, PreTrainedModel], settings: SpeedSettings) -> int:
    """Prompt tokens that leave room for the new ones in the context of every model."""
    contexts = [
        getattr(model.config.get_text_config(), "max_position_embeddings", None)
        for model in models.values()
    ]
    room = min((context for context in contexts if context), default=settings.prompt * 2)
    return max(1, min(settings.prompt, room - settings.new_tokens))


@torch.inference_mode()
def _time_once(
    model: PreTrainedModel, batch: int, prompt: int, new_tokens: int
) -> tuple[float, float]:
    """Seconds for the prompt and for the new tokens (greedy)."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(batch * prompt, device=model.device).view(batch, prompt) % vocabulary
    start = _now(model.device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    after_prompt = _now(model.device)
    for _ in range(new_tokens):
        token: Tensor = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, use_cache=True, **cache_argument(output))
    return after_prompt - start, _now(model.device) - after_prompt


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
