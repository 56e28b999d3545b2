"""Forward passes over full, unpadded blocks of tokens, without a mask to build."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Full blocks need no mask but causality. Under its own name, SDPA is called with `is_causal` and
# transformers builds no mask for it: building one costs a device synchronisation in every forward
# pass and, under torch.compile, a [batch, 1, length, length] mask that rules flash kernels out.
CAUSAL_SDPA = "tpa_convert_causal_sdpa"


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA for keys and values of different widths, which flash kernels refuse: zeros even them."""
    width = value.shape[-1]
    even = max(key.shape[-1], width)
    query, key, value = (
        nn.functional.pad(x, (0, even - x.shape[-1])) if x.shape[-1] < even else x
        for x in (query, key, value)
    )
    output, _ = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
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
