"""Least squares of the output projections behind the converted layers: closed form, no optimiser.

As in `regression`, layers go in order, and inputs come from the converted layers below. Only W_O
changes, so one pass over the text is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tpa_convert.forward.walk import DecoderWalk, first
from tpa_convert.progress import Track, no_tracking
from tpa_convert.refinement.adaptation import Adaptation, LayerError, adapt_model
from tpa_convert.refinement.streams import Target

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
def refit_layer(walk: DecoderWalk, index: int, target: Target) -> LayerError:
    """Refits W_O of one layer in place.

    Args:
        walk: of the converted model, whose states are about to enter layer `index`.
        target: of its attention; the first blocks are held out to choose the damping.
    """
    held_out = max(1, round(VALID_SHARE * len(walk.states)))
    valid = _products(walk, index, target, range(held_out))
    train = _products(walk, index, target, range(held_out, len(walk.states)))
    change, before, after = ridge_change(train, valid)
    weight = _output_projection(walk, index).weight
    weight += change.mT.to(weight)
    tokens = held_out * walk.states.shape[1]
    return LayerError(before.item() / tokens, after.item() / tokens)


REFIT = Adaptation("refit", refit_layer, BATCH_SIZE)


def refit(
    source: PreTrainedModel,
    model: PreTrainedModel,
    blocks: Tensor,
    *,
    track: Track = no_tracking,
) -> list[LayerError]:
    """Refits W_O of every layer of `model` in place; both models are fp32 and on the same device.

    Args:
        source: what `model` was converted from.
        model: the converted model.
        blocks: token ids [N, length], N >= 2; an eighth of them is held out to choose the damping.
        track: shows progress over the layers.

    Raises:
        UserError: fewer than two blocks.
    """
    return adapt_model(REFIT, source, model, blocks, track=track)


def _output_projection(walk: DecoderWalk, index: int) -> nn.Linear:
    """W_O of a converted layer."""
    return cast(nn.Linear, walk.attention(index).o_proj)


def _products(walk: DecoderWalk, index: int, target: Target, blocks: range) -> Products:
    """Of the regression of what the attention's output lacks on the input of its W_O."""
    captured: list[Tensor] = []
    hook = _output_projection(walk, index).register_forward_pre_hook(
        lambda _, arguments: captured.append(arguments[0])
    )
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    energy: Tensor | float = 0.0
    for start in range(blocks.start, blocks.stop, BATCH_SIZE):
        batch = slice(start, min(start + BATCH_SIZE, blocks.stop))
        hidden, keywords = walk.attention_input(index, walk.states[batch])
        output = first(walk.attention(index)(hidden, **keywords))
        weight = target.scale[batch].flatten(0, 1).rsqrt()
        heads = captured.pop().flatten(0, 1) * weight
        lack = (target.output[batch] - output).flatten(0, 1) * weight
        # products in the streams' own precision, sums in double
        gram = gram + (heads.mT @ heads).double()
        cross = cross + (heads.mT @ lack).double()
        energy = energy + lack.double().square().sum()
    hook.remove()
    assert isinstance(gram, Tensor)
    assert isinstance(cross, Tensor)
    assert isinstance(energy, Tensor)
    return Products(gram, cross, energy)
