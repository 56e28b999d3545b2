"""Layer-wise refinement of a converted model: regress the source's attention output, no logits.

Each layer learns by itself, in order. Its inputs come from the already refined layers below it and
its target is the source's residual stream after attention, so that it also makes up for what they
lost. Only the attention parameters move; memory is one layer and the residual streams.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tpa_convert.errors import UserError
from tpa_convert.forward.layers import run_layer
from tpa_convert.forward.passes import block_forward
from tpa_convert.modeling import TPAForCausalLM
from tpa_convert.modeling.modeling_tpa import TPADecoderLayer
from tpa_convert.progress import Track, no_tracking


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


@dataclass(frozen=True)
class LayerRefinement:
    """Held-out relative squared error of one layer before and after."""

    before: float
    after: float


def relative_error(output: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Mean over tokens of |output − target|² / scale, fp32.

    Args:
        output, target: [b, t, D].
        scale: [b, t, 1], what a token's error is measured against.
    """
    return ((output.float() - target.float()).square() / scale).sum(-1).mean()


class StreamPair:
    """Residual streams of the source and of the converted model, one batch at a time."""

    def __init__(self, source: PreTrainedModel, model: TPAForCausalLM, blocks: Tensor, size: int):
        self.source, self.model, self.size = source.model, model.model, size
        device = next(model.parameters()).device
        blocks = blocks.to(device)
        self.source_stream = self.source.embed_tokens(blocks)
        self.stream = self.source_stream.clone()
        positions = torch.arange(blocks.shape[1], device=device)[None]
        self.positions = positions
        self.rotary = self.model.rotary_emb(self.stream, positions)

    def advance_source(self, layer: LlamaDecoderLayer) -> Tensor:
        """Runs a layer of the source; returns its residual stream after attention."""
        middle = torch.empty_like(self.source_stream)
        start = 0

        def capture(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            middle[start : start + len(arguments[0])] = arguments[0]

        hook = layer.post_attention_layernorm.register_forward_pre_hook(capture)
        for start in range(0, len(middle), self.size):
            batch = slice(start, start + self.size)
            self.source_stream[batch] = run_layer(
                layer, self.source_stream[batch], self.positions, self.rotary
            )
        hook.remove()
        return middle

    def target(self, layer: LlamaDecoderLayer) -> tuple[Tensor, Tensor]:
        """Runs a layer of the source; returns the attention output that the converted layer should
        have, [N, t, D], and what the error of each token is measured against, [N, t, 1]."""
        drift = self.stream - self.source_stream
        middle = self.advance_source(layer)
        # What the next norm sees is the error relative to the token's own size. Tokens that drifted
        # beyond repair (massive activations in one stream only) must not decide all.
        scale = middle.square().sum(-1, keepdim=True) + drift.square().sum(-1, keepdim=True)
        return middle - self.stream, scale

    def advance(self, layer: TPADecoderLayer) -> None:
        """Runs a layer of the converted model."""
        for start in range(0, len(self.stream), self.size):
            batch = slice(start, start + self.size)
            self.stream[batch] = layer(self.stream[batch], position_embeddings=self.rotary)


def refine_layer(
    attention: nn.Module,
    norm: nn.Module,
    inputs: Tensor,
    target: Tensor,
    scale: Tensor,
    rotary: tuple[Tensor, Tensor],
    settings: RefinementSettings,
    generator: torch.Generator,
) -> LayerRefinement:
    """Regresses one layer's attention; the state with the least held-out error stays.

    Args:
        attention, norm: the attention of a converted layer and the norm before it.
        inputs: the layer's residual stream, [N, t, D].
        target: wanted attention output, [N, t, D].
        scale: [N, t, 1].
        rotary: position embeddings.
    """
    held_out = max(1, round(settings.valid_share * len(inputs)))
    bf16 = inputs.is_cuda

    def error(index: Tensor | slice) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                normed = norm(inputs[index])
            output, _ = attention(normed, position_embeddings=rotary)
        return relative_error(output, target[index], scale[index])

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
            index, order = order[:batch_size], order[batch_size:]
            error((index + held_out).to(inputs.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % max(1, settings.steps // settings.checks) == 0:
                now = held_out_error()
                if now < best:
                    best, state = now, copy.deepcopy(attention.state_dict())
    attention.load_state_dict(state)
    return LayerRefinement(before, best)


@torch.no_grad()
def refine(
    source: PreTrainedModel,
    model: TPAForCausalLM,
    blocks: Tensor,
    settings: RefinementSettings | None = None,
    *,
    track: Track = no_tracking,
) -> list[LayerRefinement]:
    """Refines every layer of `model` in place; both models are fp32 and on the same device.

    Args:
        source: what `model` was converted from.
        model: the converted model.
        blocks: token ids [N, length], N >= 2; the first `valid_share` of them are held out.
        track: shows progress over the layers.

    Raises:
        UserError: fewer than two blocks.
    """
    if len(blocks) < 2:
        raise UserError("refinement needs at least two calibration sequences: give more text")
    settings = settings or RefinementSettings()
    generator = torch.Generator().manual_seed(settings.seed)
    streams = StreamPair(source, model, blocks, settings.batch_size)
    report = []
    layers = cast(list[TPADecoderLayer], list(model.model.layers))
    # Compiling takes as long as a hundred steps, so only what all layers share is worth it.
    alike = len({layer.self_attn.shape for layer in layers}) == 1
    compiled = (
        [layer.self_attn for layer in layers] if alike and model.device.type == "cuda" else []
    )
    with block_forward(model, compiled):
        pairs = list(zip(source.model.layers, layers, strict=True))
        for source_layer, layer in track(pairs, "refining"):
            target, scale = streams.target(source_layer)
            report.append(
                refine_layer(
                    layer.self_attn,
                    layer.input_layernorm,
                    streams.stream,
                    target,
                    scale,
                    streams.rotary,
                    settings,
                    generator,
                )
            )
            streams.advance(layer)
    return report
