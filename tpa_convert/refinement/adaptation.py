"""Converted layers brought closer to the source: of a model in memory, or as they are made.

Layers go in order, and inputs come from the adapted layers below. Only the attention changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.conversion.model import Conversion, Part
from tpa_convert.errors import UserError
from tpa_convert.forward.passes import block_forward
from tpa_convert.forward.walk import DecoderWalk, attention_modules
from tpa_convert.modeling import LayerShape, TPAAttention
from tpa_convert.progress import Track, no_tracking
from tpa_convert.refinement.streams import StreamPair, Target
from tpa_convert.sources import held
from tpa_convert.storage import Store


@dataclass(frozen=True)
class LayerError:
    """Held-out relative squared error of the attention of one layer before and after."""

    before: float
    after: float


@dataclass(frozen=True)
class Adaptation:
    """A way to bring the attention of a converted layer closer to what it should return.

    Attributes:
        name: for messages and progress.
        layer: changes the attention of a layer in fp32 and in place, given the walk whose states
            are about to enter it, its index, and its target.
        batch_size: blocks that go through a layer at once.
        generator: of what `layer` draws, from the first layer to the last.
        compiles: whether so many passes are made that compiling the attention is worth it on a GPU,
            if all layers can share that: it takes as long as a hundred steps.
    """

    name: str
    layer: Callable[[DecoderWalk, int, Target], LayerError]
    batch_size: int
    generator: torch.Generator | None = None
    compiles: bool = False

    def check(self, blocks: Tensor) -> None:
        """Refuses too little text.

        Raises:
            UserError: fewer than two blocks.
        """
        if len(blocks) < 2:
            raise UserError(
                f"a {self.name} needs at least two calibration sequences: give more text"
            )


@torch.no_grad()
def adapt_model(
    adaptation: Adaptation,
    source: PreTrainedModel,
    model: PreTrainedModel,
    blocks: Tensor,
    *,
    track: Track = no_tracking,
) -> list[LayerError]:
    """Adapts every layer of `model` in place; both models are fp32 and on the same device.

    Args:
        source: what `model` was converted from.
        model: the converted model.
        blocks: token ids [N, length], N >= 2.
        track: shows progress over the layers.

    Raises:
        UserError: fewer than two blocks.
    """
    adaptation.check(blocks)
    attentions = attention_modules(model)
    alike = len({tuple(p.shape for p in module.parameters()) for module in attentions}) == 1
    compiled = attentions if adaptation.compiles and alike and model.device.type == "cuda" else []
    report = []
    with block_forward(model, compiled):
        streams = StreamPair(source, model, blocks, adaptation.batch_size)
        for index in track(range(len(attentions)), adaptation.name):
            target = streams.target(index)
            report.append(adaptation.layer(streams.model, index, target))
            streams.model.advance(index)
    return report


class AdaptedConversion:
    """A `Conversion` whose layers are adapted as they are made, from the first to the last.

    No converted model is needed: its states pass the layers of the source's own decoder, with the
    converted attention of one layer at a time in it.
    """

    def __init__(
        self, conversion: Conversion, adaptation: Adaptation, blocks: Tensor, store: Store
    ):
        """
        Args:
            conversion: of a source in fp32.
            blocks: token ids [N, length], N >= 2.
            store: gets what enters each layer in both models, and the errors of those below: from
                there a run goes on that was cut short. A layer's are kept until the one above is
                made too, for a run may be cut short before it has written what it was given.

        Raises:
            UserError: fewer than two blocks.
        """
        adaptation.check(blocks)
        self.conversion, self.adaptation = conversion, adaptation
        self.blocks, self.store = blocks, store
        self.description = f"{conversion.description} with a {adaptation.name}"
        self.tied, self.empty_model = conversion.tied, conversion.empty_model
        self._streams: StreamPair | None = None
        self._layer = 0  # that the states of both are about to enter

    def __len__(self) -> int:
        return len(self.conversion)

    @property
    def errors(self) -> list[LayerError]:
        """Of all layers, once they are made."""
        errors = self.store[_entering(len(self) - 2)]["errors"]
        return [LayerError(*layer) for layer in errors.tolist()]

    @torch.no_grad()
    def part(self, index: int) -> Part:
        """As `Conversion.part`. Layers are asked for in order, those before the first one that is
        asked for having been made by another run with the same store."""
        if not 0 < index < len(self) - 1:
            return self.conversion.part(index)
        with self.in_place(index - 1) as (module, shape):
            pass
        return self.conversion.layer(index - 1, module.state_dict(), shape)

    @contextmanager
    def in_place(self, index: int) -> Iterator[tuple[TPAAttention, LayerShape]]:
        """As `Conversion.in_place`, of the adapted attention. Layers are asked for as `part` asks
        for them."""
        model, plan = self.conversion.source.model, self.conversion.plan
        alike = len({replace(x, key_pairs=None) for x in plan.layers}) == 1
        with ExitStack() as stack:
            with block_forward(model):
                streams = self._at(index)
                stack.enter_context(held(streams.model.layers[index]))
                target = streams.target(index)
                module, shape = stack.enter_context(self.conversion.in_place(index))
                compiles = self.adaptation.compiles and alike and target.output.is_cuda
                with block_forward(model, [module] if compiles else []):
                    errors = self.adaptation.layer(streams.model, index, target)
                    streams.model.advance(index)
            self._keep(index, streams, errors)
            yield module, shape

    def _keep(self, layer: int, streams: StreamPair, errors: LayerError) -> None:
        """Stores what a run that goes on behind a layer needs."""
        self._layer, generator = layer + 1, self.adaptation.generator
        error = torch.tensor([[errors.before, errors.after]], dtype=torch.float64)
        below = [self.store[_entering(layer)]["errors"]] if layer else []
        self.store[_entering(layer + 1)] = {
            "source": streams.source.states.cpu(),
            "model": streams.model.states.cpu(),
            "errors": torch.cat([*below, error]),
            **({} if generator is None else {"generator": generator.get_state()}),
        }
        self.store.pop(_entering(layer - 1), None)

    def _at(self, layer: int) -> StreamPair:
        """Both streams, about to enter a layer."""
        if self._streams is None:
            source = self.conversion.source
            self._streams = StreamPair(
                source.model,
                source.model,
                self.blocks,
                self.adaptation.batch_size,
                source.family.names.attention,
            )
        if self._layer != layer:
            stored = self.store[_entering(layer)]
            self._streams.source.states.copy_(stored["source"])
            self._streams.model.states.copy_(stored["model"])
            if self.adaptation.generator is not None:
                self.adaptation.generator.set_state(stored["generator"])
        return self._streams


def _entering(index: int) -> str:
    """Of what enters a layer in a store."""
    return f"entering-{index:05}"
