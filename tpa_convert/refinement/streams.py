"""What the attention of each converted layer should return, from the source and the layers below.

Where a layer adds its attention's output to the residual stream, the target is the source's stream
after that sum, so that a layer also makes up for what was lost below it. Where the output is normed
first, or the feed-forward part runs beside the attention, no output of the attention alone can do
that, and the target is what the source's own attention returns. Which of the two a layer does is
found out by looking, see `find_sum`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tpa_convert.forward.walk import DecoderWalk, attention_name

TOLERANCE = 1e-3  # of the sum, and of its multiplier, relative
LEAST_ENERGY = 1e-2  # of an output, of the mean over tokens: below it, errors count as if it had it


@dataclass(frozen=True)
class Sum:
    """Where a layer adds its attention's output to the residual stream.

    Attributes:
        reader: the first of the layer's modules that is called with the sum.
        multiplier: of the attention's output in the sum.
    """

    reader: nn.Module
    multiplier: float


@dataclass(frozen=True)
class Target:
    """What the attention of a layer should return.

    Attributes:
        output: wanted, [N, L, D].
        scale: what the squared error of a token's output is measured against, [N, L, 1].
    """

    output: Tensor
    scale: Tensor


@torch.no_grad()
def find_sum(walk: DecoderWalk, index: int) -> Sum | None:
    """Whether layer `index` of a walk whose states are about to enter it adds its attention's
    output, times a number, to them; None if no module of the layer is called with such a sum."""
    hidden, attention = walk.states[:1], walk.attention(index)
    inside = set(attention.modules())
    outputs: list[Tensor] = []
    readers: list[tuple[nn.Module, Any]] = []

    def returned(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    def called(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if outputs:
            readers.append((module, _first(positional, keywords)))

    others = [m for m in walk.layers[index].modules() if m not in inside][1:]
    hooks = [attention.register_forward_hook(returned)]
    hooks += [module.register_forward_pre_hook(called, with_kwargs=True) for module in others]
    try:
        walk.run(index, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    output = outputs[0].double()
    for reader, seen in readers:
        if isinstance(seen, Tensor) and seen.shape == hidden.shape:
            added = seen.double() - hidden.double()
            multiplier = ((added * output).sum() / output.square().sum()).item()
            error = (added - multiplier * output).norm()
            if error < TOLERANCE * (multiplier * output).norm():
                return Sum(reader, 1.0 if abs(multiplier - 1) < TOLERANCE else multiplier)
    return None


class StreamPair:
    """The source and a converted model, side by side on the same blocks.

    Attributes:
        source, model: their walks, whose states enter the same layer.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        model: PreTrainedModel,
        blocks: Tensor,
        batch_size: int,
        attention: str | None = None,
    ):
        """
        Args:
            model: may be the source too, if the converted attention of a layer is put into it while
                the model's states pass that layer.
            attention: the attribute of a layer that holds its attention, in both; by default, the
                converted model knows.
        """
        attention = attention or attention_name(model)
        self.source = DecoderWalk(source, blocks, batch_size, attention)
        self.model = DecoderWalk(model, blocks, batch_size, attention)

    @torch.no_grad()
    def target(self, index: int) -> Target:
        """Takes the source through layer `index`; what the converted layer's attention should
        return where the model's states enter it."""
        drift = self.model.states - self.source.states
        found = find_sum(self.source, index)
        if found is None:
            return self._own_output(index, drift)
        middle = torch.empty_like(self.source.states)
        with _inputs_of(found.reader) as inputs:
            for batch, _ in zip(self.source.batches, self.source.observe(index), strict=True):
                middle[batch] = inputs.pop()
        # What the next norm sees is the error relative to the token's own size. Tokens that drifted
        # beyond repair (massive activations in one stream only) must not decide all.
        scale = _energy(middle) + _energy(drift)
        wanted = middle.sub_(self.model.states)
        if found.multiplier == 1:
            return Target(wanted, scale)
        return Target(wanted.div_(found.multiplier), scale / found.multiplier**2)

    def _own_output(self, index: int, drift: Tensor) -> Target:
        """`target` of a layer that does not add its attention's output to the stream."""
        drifted = 1 + _energy(drift) / _energy(self.source.states)
        output = torch.empty_like(self.source.states)
        for batch, call in zip(self.source.batches, self.source.observe(index), strict=True):
            output[batch] = call.output
        # As above, if a norm comes next; but not tokens that attend to nearly nothing.
        energy = _energy(output)
        return Target(output, energy.clamp_min(LEAST_ENERGY * energy.mean()) * drifted)


def _first(positional: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """What a module is called with first."""
    return next(iter((*positional, *keywords.values())), None)


def _energy(states: Tensor) -> Tensor:
    """Squared lengths [N, L, 1] of states [N, L, D]."""
    return states.square().sum(-1, keepdim=True)


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list of the hidden states that a module is called with."""
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(
        lambda _, positional, keywords: inputs.append(_first(positional, keywords)),
        with_kwargs=True,
    )
    try:
        yield inputs
    finally:
        hook.remove()
