"""Text sampled from the source itself, for healing where there is no other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tpa_convert.errors import UserError
from tpa_convert.forward.ids import check_ids
from tpa_convert.healing.training.chat import ChatTurns, chat_script
from tpa_convert.modeling import source_head_dim, source_key_value_heads
from tpa_convert.progress import Track, no_tracking

GPU_BATCH = 1024  # sampling is bound by launches and weights, so many sequences cost little more
CPU_TOKENS = 16_384  # cached at once: a step reads all weights, for however many sequences
GROUPED_SDPA = "tpa_convert_grouped_sdpa"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA that reads the cache once in a decoding step where transformers copies it for all heads.

    Query heads [B, H, 1, D] that share keys and values [B, G, T, D] become queries of one head.
    """
    batch, heads, length, width = query.shape
    if length > 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    grouped = query.reshape(batch, key.shape[1], -1, width)
    output = nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(batch, 1, heads, -1), None


AttentionInterface.register(GROUPED_SDPA, grouped_attention)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


@torch.no_grad()
def sample_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    block_length: int,
    *,
    chat: bool = False,
    temperature: float = 1.0,
    batch_size: int | None = None,
    seed: int = 0,
    track: Track = no_tracking,
) -> Tensor:
    """Sequences that `model` continues from nothing but its begin-of-text token.

    Sampling does not stop at an end-of-text token: the model goes on with another document, as in
    packed training text. Chats are sampled whole, the user's turn too ("Magpie", arXiv 2406.08464):
    the model continues its chat template up to where a user speaks, the template is filled in where
    it ends a turn, and after its answer the next chat begins. The last chat of a block is cut.

    On a GPU the forward pass of several batches is compiled, over a cache of fixed size; load the
    model in bfloat16.

    Args:
        model: the source.
        tokenizer: its own.
        tokens: how many at least; whole blocks are sampled.
        block_length: tokens of a block, what it starts with included.
        chat: sample chats.
        temperature: 1 samples from the model's own distribution.
        batch_size: blocks at once, at most; by default chosen for the device.
        seed: the same seed gives the same text on the same kind of device.
        track: shows progress over the batches.

    Returns: token ids, int64 [N, block_length], on the CPU.

    Raises:
        UserError: the tokenizer has neither a begin- nor an end-of-text token to start from; for
            chats, see `chat_script`, or blocks that are too short for a chat.
    """
    script = chat_script(tokenizer) if chat else None
    start = script.prefix if script else [_begin_of_text(tokenizer)]
    check_ids(model, max(start + (script.between + script.after if script else [])))
    if len(start) >= block_length:
        raise UserError(
            f"the chat template takes {len(start)} tokens before the user speaks: "
            f"block_length must be larger, not {block_length}"
        )
    device = model.device
    cuda = device.type == "cuda"
    count = math.ceil(tokens / block_length)
    batch_size = batch_size or (
        _gpu_batch(model, block_length) if cuda else max(1, CPU_TOKENS // block_length)
    )
    sizes = [min(batch_size, count - done) for done in range(0, count, batch_size)]
    if cuda:  # batches of one shape, for one graph
        sizes = [math.ceil(count / len(sizes))] * len(sizes)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=block_length - len(start),
        pad_token_id=start[0],
        eos_token_id=None,
        # Which compiles the forward pass: a minute that one batch does not earn.
        cache_implementation="static" if cuda and len(sizes) > 1 else None,
    )
    description = "sampling chats" if chat else "sampling text"
    blocks = []
    with _generation(model, config, seed):
        for size in track(sizes, description, tokens=sizes[0] * block_length):
            prompt = torch.tensor([start], device=device).repeat(size, 1)
            turns = [ChatTurns(script, size, device)] if script else []
            blocks.append(
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    logits_processor=LogitsProcessorList(turns),
                ).cpu()
            )
    return torch.cat(blocks)[:count]


def can_sample(tokenizer: PreTrainedTokenizerBase, block_length: int) -> bool:
    """Whether there is a token to start from, and room for another behind it."""
    return block_length > 1 and _start(tokenizer) is not None


def _start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    start = tokenizer.bos_token_id
    return tokenizer.eos_token_id if start is None else start


def _begin_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    start = _start(tokenizer)
    if start is None:
        raise UserError(
            "the source's tokenizer has no begin-of-text token to sample from: give text instead"
        )
    return start


def _gpu_batch(model: PreTrainedModel, block_length: int) -> int:
    """How many sequences have room in half of the free memory: their cache, and a few logits."""
    config = model.config.get_text_config()
    cached = 2 * config.num_hidden_layers * source_key_value_heads(config) * source_head_dim(config)
    per_block = cached * model.dtype.itemsize * block_length + 32 * config.vocab_size
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(GPU_BATCH, free // 2 // per_block))


@contextmanager
def _generation(model: PreTrainedModel, config: GenerationConfig, seed: int) -> Iterator[None]:
    """Seeded generation with a config; the model, the seed and the GPU's memory are given back."""
    cuda = model.device.type == "cuda"
    original, attention = model.generation_config, model.config._attn_implementation
    with torch.random.fork_rng([model.device] if cuda else []):
        torch.manual_seed(seed)
        model.generation_config = config  # generate() fills gaps of a given one from the model's
        if attention == "sdpa":
            model.set_attn_implementation(GROUPED_SDPA)
        try:
            yield
        finally:
            model.generation_config = original
            model.set_attn_implementation(attention)
            if cuda:
                vars(model).pop("_compiled_call", None)
                torch.compiler.reset()  # the graphs hold memory that training needs
                torch.cuda.empty_cache()
