"""A source whose own cache is quantised, as what a user would pick instead of a conversion."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tpa_convert.forward.passes import causal_attention

GROUP = 32  # numbers that share a scale and a zero point of 16 bits each


def share_of_bytes(bits: int) -> float:
    """Of 16 bits a number, scales and zero points counted."""
    return (bits + 32 / GROUP) / 16


def quantise(x: Tensor, bits: int, dim: int) -> Tensor:
    """Numbers rounded to 2^bits evenly spaced values between the least and the largest of every
    `GROUP` along a dimension."""
    moved = x.movedim(dim, -1)
    rest = -moved.shape[-1] % GROUP
    # a group that is not full has the last number again, which widens no range
    padded = torch.cat((moved, moved[..., -1:].expand(*moved.shape[:-1], rest)), dim=-1)
    groups = padded.unflatten(-1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    rounded = (((groups - low) / step).round() * step + low).flatten(-2)
    return rounded[..., : moved.shape[-1]].movedim(-1, dim)


def quantised_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    bits: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention on keys quantised by channel and values by token (KIVI, arXiv 2402.02750),
    [b, g, t, d] each; without the recent tokens that KIVI keeps exact."""
    key, value = quantise(key, bits, dim=2), quantise(value, bits, dim=3)
    return causal_attention(module, query, key, value, *args, **kwargs)


def quantised_source(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A model that attends to what its cache would hold if it were quantised, in passes over full
    blocks without a cache. It shares its weights with the one given."""
    tensors = [*model.parameters(), *model.buffers()]
    other = copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
    other.set_attn_implementation(quantised_attention_name(bits))
    return other


def quantised_attention_name(bits: int) -> str:
    """The name that transformers knows this attention by."""
    name = f"tpa_convert_quantised_{bits}"
    AttentionInterface.register(name, partial(quantised_attention, bits=bits))
    return name
