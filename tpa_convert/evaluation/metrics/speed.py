"""Prefill and decode speed, measured by turns so that a busy machine is unfair to no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from tpa_convert.forward.cached import cache_argument, cache_of
from tpa_convert.progress import Track, no_tracking


@dataclass(frozen=True)
class Speed:
    """Tokens per second over the whole batch; medians of the repeats.

    Attributes:
        prefill: prompt tokens read per second.
        decode: tokens generated per second, one at a time for each sequence, after the prompt.
        cache_bytes: what the cache holds of all sequences, halfway through the new tokens.
    """

    prefill: float
    decode: float
    cache_bytes: float = 0.0


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed: `batch` prompts of `prompt` tokens, then `new_tokens` more for each.

    Attributes:
        static: whether the cache is a static one, just long enough; on a GPU each new token is then
            the replay of a CUDA graph, so that the host takes no part in its time.
    """

    batch: int = 1
    prompt: int = 512
    new_tokens: int = 32
    repeats: int = 3
    static: bool = False


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    settings: SpeedSettings | None = None,
    *,
    track: Track = no_tracking,
) -> dict[str, Speed]:
    """Speed of each model, on the device and in the dtype it has.

    A first round warms up and is not counted. The prompt is shortened where it does not fit into
    a model's context together with the new tokens.
    """
    settings = settings or SpeedSettings()
    prompt = fitting_prompt(models, settings)
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    time_once = _time_static if settings.static else _time_once
    turns = [(repeat, name) for repeat in range(settings.repeats + 1) for name in models]
    for repeat, name in track(turns, "Speed"):
        measured = time_once(models[name].eval(), settings.batch, prompt, settings.new_tokens)
        if repeat > 0:
            times[name].append(measured)
    return {
        name: Speed(
            prefill=settings.batch * prompt / median(t for t, _, _ in runs),
            decode=settings.batch * settings.new_tokens / median(t for _, t, _ in runs),
            cache_bytes=runs[-1][2] * (1 + settings.new_tokens / (2 * prompt)),
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


def prompts(model: PreTrainedModel, batch: int, prompt: int) -> Tensor:
    """Token ids [batch, prompt] that differ."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.arange(batch * prompt, device=model.device).view(batch, prompt) % vocabulary


def held_bytes(cache: Any) -> float:
    """Bytes of the keys and values in a cache."""
    tensors = (x for layer in cache.layers for x in (layer.keys, layer.values))
    return float(sum(x.nbytes for x in tensors if isinstance(x, Tensor)))


@torch.inference_mode()
def _time_once(
    model: PreTrainedModel, batch: int, prompt: int, new_tokens: int
) -> tuple[float, float, float]:
    """Seconds for the prompt and for the new tokens (greedy), and bytes cached of the prompt."""
    ids = prompts(model, batch, prompt)
    start = _now(model.device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    after_prompt = _now(model.device)
    held = held_bytes(cache_of(output)) if cache_of(output) is not None else 0.0
    begin = _now(model.device)
    for _ in range(new_tokens):
        token: Tensor = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, use_cache=True, **cache_argument(output))
    return after_prompt - start, _now(model.device) - begin, held


# No inference mode: tensors of it cannot be changed in a captured graph's warm-up.
@torch.no_grad()
def _time_static(
    model: PreTrainedModel, batch: int, prompt: int, new_tokens: int
) -> tuple[float, float, float]:
    """As `_time_once`, on a static cache; the new tokens are replays of a graph on a GPU."""
    ids = prompts(model, batch, prompt)
    graphed = model.device.type == "cuda"
    # Two steps more: one that warms up, and one while the graph is captured.
    room = prompt + new_tokens + 2
    cache = StaticCache(config=model.config, max_cache_len=room)
    start = _now(model.device)
    output = model(input_ids=ids, use_cache=True, past_key_values=cache, logits_to_keep=1)
    after_prompt = _now(model.device)
    held = held_bytes(cache) * prompt / room
    token = output.logits[:, -1:].argmax(-1)
    position = torch.full((batch, 1), prompt, device=model.device)

    def step() -> None:
        logits = model(
            input_ids=token, position_ids=position, use_cache=True, past_key_values=cache
        ).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    advance: Callable[[], object] = step
    if graphed:
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        advance = graph.replay
    begin = _now(model.device)
    for _ in range(new_tokens):
        advance()
    return after_prompt - start, _now(model.device) - begin, held


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
