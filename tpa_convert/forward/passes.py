"""Forward passes over full, unpadded blocks of tokens, without a mask to build."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Full blocks need no mask but causality and, in some layers, a window. Under its own name, SDPA is
# called with `is_causal` and transformers builds no mask for it: building one costs a device
# synchronisation in every forward pass and, under torch.compile, a [batch, 1, length, length] mask
# that rules flash kernels out.
CAUSAL_SDPA = "tpa_convert_causal_sdpa"


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Whether a query attends to a position: itself and the `window` - 1 before, bool
    [1, 1, length, length]."""
    attended = torch.ones(length, length, dtype=torch.bool, device=device)
    return attended.tril_().triu_(1 - window)[None, None]


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal SDPA, within `sliding_window` positions where that is shorter than the block.

    Keys and values of different widths are evened with zeros, since flash kernels refuse them.
    """
    length = query.shape[2]
    if sliding_window is not None and sliding_window < length:
        attention_mask = window_mask(length, sliding_window, query.device)
    width = value.shape[-1]
    even = max(key.shape[-1], width)
    query, key, value = (
        nn.functional.pad(x, (0, even - x.shape[-1])) if x.shape[-1] < even else x
        for x in (query, key, value)
    )
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output[..., :width], None


AttentionInterface.register(CAUSAL_SDPA, causal_attention)


@contextmanager
def block_forward(
    model: PreTrainedModel,
    compiled_modules: Iterable[nn.Module] = (),
    autocast: bool = False,
) -> Iterator[None]:
    """Make forward passes over full, unpadded blocks fast; undone on leaving.

    Args:
        compiled_modules: what `modules_to_compile` says, or nothing.
        autocast: whether passes run under bf16 autocast. The residual stream would have the dtype
            of the embedding, fp32, although all that is added to it comes from bf16 products: it is
            made bf16.
    """
    compiled_modules = list(compiled_modules)
    cast = model.get_input_embeddings().register_forward_hook(
        lambda _, __, hidden: hidden.bfloat16() if autocast else hidden
    )
    swap_attention = model.config._attn_implementation == "sdpa"
    if swap_attention:
        model.set_attn_implementation(CAUSAL_SDPA)
    for module in compiled_modules:
        module.forward = torch.compile(module.forward, dynamic=False)
    try:
        yield
    finally:
        cast.remove()
        for module in compiled_modules:
            del module.forward
        if swap_attention:
            model.set_attn_implementation("sdpa")
