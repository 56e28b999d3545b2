"""Text sampled from the source itself, for healing where there is no other."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.calibration.moments import Track, no_tracking
from tpa_convert.errors import UserError

GPU_BATCH = 512  # sampling is bound by launches and weights, so many sequences cost little more
CPU_BATCH = 16


@torch.no_grad()
def sample_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    block_length: int,
    *,
    temperature: float = 1.0,
    batch_size: int | None = None,
    seed: int = 0,
    track: Track = no_tracking,
) -> Tensor:
    """Sequences that `model` continues from nothing but its begin-of-text token.

    Sampling does not stop at an end-of-text token: the model goes on with another document, as in
    packed training text.

    Args:
        model: the source.
        tokenizer: its own.
        tokens: how many at least; whole blocks are sampled.
        block_length: tokens of a block, the begin-of-text token included.
        temperature: 1 samples from the model's own distribution.
        batch_size: blocks at once; by default chosen for the device.
        seed: the same seed gives the same text on the same kind of device.
        track: shows progress over the batches.

    Returns: token ids, int64 [N, block_length], on the CPU.

    Raises:
        UserError: the tokenizer has neither a begin- nor an end-of-text token to start from.
    """
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise UserError(
            "the source's tokenizer has no begin-of-text token to sample from: give text instead"
        )
    device = model.device
    batch_size = batch_size or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    count = math.ceil(tokens / block_length)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=block_length - 1,
        pad_token_id=start,
        eos_token_id=None,
    )
    sizes = [min(batch_size, count - done) for done in range(0, count, batch_size)]
    blocks = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        original = model.generation_config
        model.generation_config = config  # generate() fills gaps of a given one from the model's
        try:
            for size in track(sizes, "sampling text"):
                prompt = torch.full((size, 1), start, device=device)
                mask = torch.ones_like(prompt)
                blocks.append(model.generate(prompt, attention_mask=mask).cpu())
        finally:
            model.generation_config = original
    return torch.cat(blocks)
