"""How many sequences a GPU's memory holds, by filling it."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.evaluation.metrics.speed import held_bytes, prompts
from tpa_convert.forward.cached import cache_argument, cache_of

EXACT = 50  # the largest batch is found to one part in so many
FULL = "out of memory|ALLOC_FAILED"


def largest_batch(model: PreTrainedModel, context: int) -> int:
    """Sequences of `context` tokens that decode side by side with dynamic caches, on the model's
    GPU as full as it is otherwise: to 2 %; 0 if there is no room for one."""
    held: list[float] = []
    if not within_memory(lambda: held.append(bytes_of_one(model, context))):
        return 0
    free, _ = torch.cuda.mem_get_info(model.device)

    def fits(batch: int) -> bool:
        return within_memory(lambda: decode_copies(model, batch, context))

    return largest_that_fits(fits, int(0.9 * free / held[0]))


def within_memory(run: Callable[[], object]) -> bool:
    """Whether memory was enough for a call, of which nothing stays."""
    try:
        run()
    except RuntimeError as error:  # libraries and drivers have errors of their own
        if not isinstance(error, torch.OutOfMemoryError) and not re.search(FULL, str(error)):
            raise
        return False
    finally:
        torch.cuda.empty_cache()  # does nothing without a GPU
    return True


def largest_that_fits(fits: Callable[[int], bool], guess: int) -> int:
    """The largest n for which `fits(n)`, or one that is smaller by at most one part in `EXACT`; 0
    if not even 1 does.

    Args:
        fits: whether n does; then all that are smaller do too.
        guess: where to look first.
    """
    low, high, n = 0, 0, max(1, guess)  # what fits, and what does not, 0 if that is not known
    while True:
        if fits(n):
            low = n
        else:
            high = n
        if high and high - low <= max(1, low // EXACT):
            return low
        if not high:
            n = low + max(1, low // 10)
        elif not low:
            n = max(1, high * 9 // 10)
        else:
            n = (low + high) // 2


@torch.inference_mode()
def bytes_of_one(model: PreTrainedModel, context: int) -> float:
    """Of the cache of a sequence."""
    output = model(input_ids=prompts(model, 1, context), use_cache=True, logits_to_keep=1)
    return held_bytes(cache_of(output))


@torch.inference_mode()
def decode_copies(model: PreTrainedModel, batch: int, context: int) -> None:
    """Two new tokens of each of `batch` sequences of `context` tokens, which are copies of one, as
    servers read prompts one by one too."""
    output = model(input_ids=prompts(model, 1, context), use_cache=True, logits_to_keep=1)
    cache = cache_argument(output)
    for each in cache.values():
        each.batch_repeat_interleave(batch)
    token: Tensor = output.logits[:, -1:].argmax(-1).expand(batch, 1)
    for _ in range(2):
        output = model(input_ids=token, use_cache=True, **cache)
        token = output.logits[:, -1:].argmax(-1)
