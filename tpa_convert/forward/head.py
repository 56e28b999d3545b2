"""The output head of a model, taken apart: what it sees, its product, and what is made of that.

    logits = finish(hidden @ weight.T)

`finish` adds a bias, scales or soft-caps in some models; in most there is none. All three parts are
found by running the model's own forward function, so that nothing has to be known of its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tpa_convert.forward.stand_in import standing_in
from tpa_convert.sources import device_of

Finish = Callable[[Tensor], Tensor]
"""Products of the head's weight [..., V] -> logits of the model [..., V], differentiable."""


def with_head_input(
    model: nn.Module,
    causal_lm: PreTrainedModel,
    input_ids: Tensor,
    function: Callable[[Tensor], Tensor],
) -> Tensor:
    """Runs a model on [B, L] token ids with a function of what its output head would see [B, L, D]
    in place of its logits.

    Args:
        model: `causal_lm` as wrapped for training (DDP, ...) or itself. Its own forward is called,
            because wrappers synchronise gradients and gather shards there. `function` may use the
            head's weight, which is whole inside of it.

    Returns: what `function` returns.
    """
    head, forward = causal_lm.get_output_embeddings(), causal_lm.forward

    def stand_in(**arguments: Any) -> Tensor:
        seen: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden[..., :1]  # as good as any logits for what the model does to them

        with standing_in({head: catch}):
            forward(**arguments)
        return function(seen[0])

    with standing_in({causal_lm: stand_in}):
        return model(input_ids=input_ids, use_cache=False)


def final_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """What the output head would see: [B, L] token ids -> [B, L, D]."""
    return with_head_input(model, model, input_ids, lambda hidden: hidden)


@torch.no_grad()
def decoder_output(model: PreTrainedModel) -> type:
    """The class of what the decoder returns."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device_of(model))
    return type(model.get_decoder()(input_ids=token, use_cache=False))


@torch.no_grad()
def logit_finish(model: PreTrainedModel, output: type | None = None) -> Finish | None:
    """What `model` makes of products of its output head's weight, None if they are its logits.

    Args:
        output: `decoder_output` of the model. If it is given, matrices may be on the meta device.
    """
    output = output or decoder_output(model)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    device = device_of(model)
    if device.type == "meta":
        device = torch.device("cpu")
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    forward = model.forward  # as it is now: others may stand in for it when `finish` is called

    def finish(product: Tensor) -> Tensor:
        def decoded(*_: Any, **__: Any) -> Any:
            return output(last_hidden_state=product[..., :1].reshape(1, -1, 1))

        rows = product.reshape(1, -1, product.shape[-1])
        if head.bias is not None:
            rows = rows + head.bias.to(rows.dtype)
        with standing_in({decoder: decoded, head: lambda _: rows}):
            logits = forward(input_ids=token, use_cache=False).logits
        return logits.view(product.shape)

    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, len(head.weight), generator=generator).to(device, model.dtype)
    probe *= 4  # large enough for a soft cap to show
    return None if torch.equal(finish(probe).to(probe), probe) else finish
