"""The training sequences of a run, and how they are split into batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel

CPU_TOKENS_PER_BATCH = 4096


class BlockDataset(Dataset):
    """`num_samples` draws from `blocks` [N, L]: all in random order, then all in another, ...

    One long epoch in a fixed order makes a resumed run skip exactly what it has seen, whatever the
    batch size, and leaves no short batch at the end of a pass.
    """

    def __init__(self, blocks: Tensor, num_samples: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        passes = math.ceil(num_samples / len(blocks))
        orders = [torch.randperm(len(blocks), generator=generator) for _ in range(passes)]
        self.blocks = blocks
        self.order = torch.cat(orders)[:num_samples]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int | slice) -> Tensor:
        return self.blocks[self.order[index]]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """A whole batch [B, L] by one gather; the data loader prefers this to `__getitem__`."""
        return self.blocks[self.order[torch.as_tensor(indices)]]


def collate(batch: Tensor) -> dict[str, Tensor]:
    """Batch from `BlockDataset.__getitems__` -> model inputs."""
    return {"input_ids": batch.long()}


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit` (and at least 1)."""
    return next(d for d in range(min(number, max(1, limit)), 0, -1) if number % d == 0)


def blocks_that_fit(
    model: PreTrainedModel,
    block_length: int,
    device: torch.device,
    gradient_checkpointing: bool,
    shards: int = 1,
    awaited: int = 0,
) -> int:
    """How many sequences one forward and backward pass of `model` should take on `device`.

    On a GPU, a coarse estimate that fills half of the memory left beside weights, fp32 gradients
    and Adam's moments; on a CPU, few, because larger batches are no faster there.

    Args:
        shards: devices that share one copy of weights, gradients and moments.
        awaited: bytes of the weights that are to come to the device.
    """
    if device.type != "cuda":
        return max(1, CPU_TOKENS_PER_BATCH // block_length)
    per_token = saved_bytes_per_token(model.config.get_text_config(), gradient_checkpointing)
    free, _ = torch.cuda.mem_get_info(device)
    free -= (awaited + 12 * model.num_parameters(only_trainable=True)) // shards
    return max(1, int(free / 2 / per_token / block_length))


def saved_bytes_per_token(config: PreTrainedConfig, gradient_checkpointing: bool) -> int:
    """What a forward pass keeps of each token for the backward pass, uncompiled: about twenty bf16
    numbers per hidden unit and six per intermediate unit of a layer."""
    layer = 40 * config.hidden_size + 12 * config.intermediate_size
    if gradient_checkpointing:
        return layer + 4 * config.hidden_size * config.num_hidden_layers
    return layer * config.num_hidden_layers
