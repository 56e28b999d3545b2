"""Least squares of the output projections behind the converted layers: closed form, no optimiser.

As in `refinement`, layers go in order, inputs come from the converted layers below, and the target
is the source's residual stream after attention. Only W_O changes, so one pass over the text is
enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.errors import UserError
from tpa_convert.forward.passes import block_forward
from tpa_convert.modeling import TPAForCausalLM
from tpa_convert.modeling.modeling_tpa import TPADecoderLayer
from tpa_convert.progress import Track, no_tracking
from tpa_convert.refinement.regression import LayerRefinement, StreamPair

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the mean energy of an input
VALID_SHARE = 1 / 8
BATCH_SIZE = 8


@dataclass(frozen=True)
class Products:
    """Weighted sums over tokens of a regression of y [x] on z [n].

    Attributes:
        gram: Σ z zᵀ / scale, fp64 [n, n].
        cross: Σ z yᵀ / scale, fp64 [n, x].
        energy: Σ |y|² / scale, fp64 scalar.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor

    def error(self, weight: Tensor) -> Tensor:
        """Σ |y − weightᵀ z|² / scale for weight [n, x]."""
        return self.energy - 2 * (weight * self.cross).sum() + (weight * (self.gram @ weight)).sum()


def ridge_change(
    train: Products, valid: Products, ridges: Sequence[float] = RIDGES
) -> tuple[Tensor, Tensor, Tensor]:
    """The ridge solution that is best on held-out tokens, or zero if none is better than that.

    Args:
        train, valid: of the same regression.
        ridges: relative to the mean of the gram matrix's diagonal.

    Returns: weight fp64 [n, x], and the held-out errors of zero and of the weight.
    """
    best = torch.zeros_like(train.cross)
    before = error = valid.energy
    identity = torch.eye(len(train.gram), dtype=train.gram.dtype, device=train.gram.device)
    for ridge in ridges:
        damping = ridge * train.gram.diagonal().mean() * identity
        weight = torch.linalg.solve(train.gram + damping, train.cross)
        now = valid.error(weight)
        if now < error:
            best, error = weight, now
    return best, before, error


@torch.no_grad()
def refit(
    source: PreTrainedModel,
    model: TPAForCausalLM,
    blocks: Tensor,
    *,
    track: Track = no_tracking,
) -> list[LayerRefinement]:
    """Refits W_O of every layer of `model` in place; both models are fp32 and on the same device.

    Args:
        source: what `model` was converted from.
        model: the converted model.
        blocks: token ids [N, length], N >= 2; an eighth of them is held out to choose the damping.
        track: shows progress over the layers.

    Raises:
        UserError: fewer than two blocks.
    """
    if len(blocks) < 2:
        raise UserError("a refit needs at least two calibration sequences: give more text")
    held_out = max(1, round(VALID_SHARE * len(blocks)))
    streams = StreamPair(source, model, blocks, BATCH_SIZE)
    report = []
    layers = cast(list[TPADecoderLayer], list(model.model.layers))
    with block_forward(model):
        pairs = list(zip(source.model.layers, layers, strict=True))
        for source_layer, layer in track(pairs, "refitting"):
            target, scale = streams.target(source_layer)
            valid = _products(layer, streams, target, scale, range(held_out))
            train = _products(layer, streams, target, scale, range(held_out, len(blocks)))
            change, before, after = ridge_change(train, valid)
            projection = layer.self_attn.o_proj
            projection.weight += change.mT.to(projection.weight)
            tokens = held_out * blocks.shape[1]
            report.append(LayerRefinement(before.item() / tokens, after.item() / tokens))
            streams.advance(layer)
    return report


def _products(
    layer: TPADecoderLayer, streams: StreamPair, target: Tensor, scale: Tensor, blocks: range
) -> Products:
    """Of the regression of what the layer's output lacks on the input of its W_O."""
    captured: list[Tensor] = []
    hook = layer.self_attn.o_proj.register_forward_pre_hook(
        lambda _, arguments: captured.append(arguments[0])
    )
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    energy: Tensor | float = 0.0
    for start in range(blocks.start, blocks.stop, BATCH_SIZE):
        batch = slice(start, min(start + BATCH_SIZE, blocks.stop))
        output, _ = layer.self_attn(
            layer.input_layernorm(streams.stream[batch]), position_embeddings=streams.rotary
        )
        weight = scale[batch].flatten(0, 1).rsqrt()
        heads = captured.pop().flatten(0, 1) * weight
        lack = (target[batch] - output).flatten(0, 1) * weight
        # products in the streams' own precision, sums in double
        gram = gram + (heads.mT @ heads).double()
        cross = cross + (heads.mT @ lack).double()
        energy = energy + lack.double().square().sum()
    hook.remove()
    assert isinstance(gram, Tensor)
    assert isinstance(cross, Tensor)
    assert isinstance(energy, Tensor)
    return Products(gram, cross, energy)
