"""Layer-wise refinement of a converted model: regress the source's attention output, no logits.

Each layer learns by itself, in order. Its inputs come from the already refined layers below it, and
its target makes up for what they lost where it can (see `refinement.streams`). Only the attention
parameters move; memory is one layer and the residual streams.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.forward.walk import DecoderWalk, first
from tpa_convert.progress import Track, no_tracking
from tpa_convert.refinement.adaptation import Adaptation, LayerError, adapt_model
from tpa_convert.refinement.streams import Target


@dataclass(frozen=True)
class RefinementSettings:
    """How each layer is regressed.

    Attributes:
        steps: optimiser steps a layer.
        batch_size: blocks a step.
        learning_rate: Adam's peak rate; it rises over a tenth of the steps, then falls along a
            cosine.
        valid_share: share of the blocks held out to choose when to stop, at least one block.
        checks: how often in a layer the held-out error is measured; the best state is kept.
        seed: order of the blocks.
    """

    steps: int = 600
    batch_size: int = 16
    learning_rate: float = 3e-3
    valid_share: float = 1 / 16
    checks: int = 6
    seed: int = 0


def relative_error(output: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Mean over tokens of |output − target|² / scale, fp32.

    Args:
        output, target: [b, t, D].
        scale: [b, t, 1], what a token's error is measured against.
    """
    return ((output.float() - target.float()).square() / scale).sum(-1).mean()


def refine_layer(
    walk: DecoderWalk,
    index: int,
    target: Target,
    settings: RefinementSettings,
    generator: torch.Generator,
) -> LayerError:
    """Regresses one layer's attention; the state with the least held-out error stays.

    Args:
        walk: of the converted model, whose states are about to enter layer `index`.
        target: of its attention.
        generator: of the order of the blocks.
    """
    attention, inputs = walk.attention(index), walk.states
    held_out = max(1, round(settings.valid_share * len(inputs)))
    bf16 = inputs.is_cuda

    def error(blocks: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                hidden, keywords = walk.attention_input(index, inputs[blocks])
            output = first(attention(hidden, **keywords))
        return relative_error(output, target.output[blocks], target.scale[blocks])

    @torch.no_grad()
    def held_out_error() -> float:
        parts = torch.arange(held_out, device=inputs.device).split(settings.batch_size)
        return sum(error(part).item() * len(part) for part in parts) / held_out

    best = before = held_out_error()
    state = copy.deepcopy(attention.state_dict())
    optimizer = torch.optim.Adam(attention.parameters(), lr=settings.learning_rate, fused=bf16)
    warmup = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.steps - warmup)),
        ],
        [warmup],
    )
    count = len(inputs) - held_out
    batch_size = min(settings.batch_size, count)
    order = torch.empty(0, dtype=torch.long)
    with torch.enable_grad():
        for step in range(1, settings.steps + 1):
            if len(order) < batch_size:
                order = torch.cat((order, torch.randperm(count, generator=generator)))
            chosen, order = order[:batch_size], order[batch_size:]
            error((chosen + held_out).to(inputs.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % max(1, settings.steps // settings.checks) == 0:
                now = held_out_error()
                if now < best:
                    best, state = now, copy.deepcopy(attention.state_dict())
    attention.load_state_dict(state)
    return LayerError(before, best)


def refinement(settings: RefinementSettings) -> Adaptation:
    """The regression of every layer."""
    generator = torch.Generator().manual_seed(settings.seed)
    layer = partial(refine_layer, settings=settings, generator=generator)
    return Adaptation("refinement", layer, settings.batch_size, generator, compiles=True)


def refine(
    source: PreTrainedModel,
    model: PreTrainedModel,
    blocks: Tensor,
    settings: RefinementSettings | None = None,
    *,
    track: Track = no_tracking,
) -> list[LayerError]:
    """Refines every layer of `model` in place; both models are fp32 and on the same device.

    Args:
        source: what `model` was converted from.
        model: the converted model.
        blocks: token ids [N, length], N >= 2; the first `valid_share` of them are held out.
        track: shows progress over the layers.

    Raises:
        UserError: fewer than two blocks.
    """
    return adapt_model(
        refinement(settings or RefinementSettings()), source, model, blocks, track=track
    )
