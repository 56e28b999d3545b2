"""A causal language model of transformers, any family, run layer by layer on blocks of tokens.

Whatever a model does before its first layer, between layers and attention, and after the last one
is done by its own code. What each layer is called with (masks, position embeddings by the type of
layer, ...) is captured once and used again for all batches. Only one layer is called at a time, so
that of a model that is read on demand no more than that is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tpa_convert.errors import UserError
from tpa_convert.forward.head import final_hidden_states, logit_finish
from tpa_convert.forward.ids import check_ids
from tpa_convert.forward.logits import chunk_positions
from tpa_convert.forward.stand_in import arguments_at, named_arguments, standing_in
from tpa_convert.sources import device_of

ATTENTION = "self_attn"  # the attribute of a layer that holds its attention in most families


def attention_name(model: PreTrainedModel) -> str:
    """The attribute of a layer that holds its attention; a converted decoder knows."""
    names = getattr(model.get_decoder(), "attention_names", None)
    return ATTENTION if names is None else names.attention


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of all layers."""
    return [getattr(layer, attention_name(model)) for layer in model.get_decoder().layers]


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention.

    Attributes:
        hidden: its input, [b, L, D].
        keywords: everything else it is called with, by name.
        output: the hidden states that it returns, [b, L, D].
    """

    hidden: Tensor
    keywords: dict[str, Any]
    output: Tensor


def first(output: Any) -> Tensor:
    """The hidden states among what a layer or its attention returns."""
    return output[0] if isinstance(output, tuple) else output


class DecoderWalk:
    """Hidden states of token blocks on their way through the layers of a model.

    Attributes:
        layers: the model's.
        states: hidden states entering the next layer, [N, L, D]; changed in place by `advance` and
            `observe`.
        batches: the slices of `states` that go through a layer at once.
        arguments: what each layer is called with besides hidden states, for a batch of one block
            of the same length.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Tensor,
        batch_size: int,
        attention: str | None = None,
    ):
        """
        Args:
            model: left as it is; its layers run in the mode (attention implementation, ...) that
                it has now.
            blocks: token ids [N, L], unpadded.
            batch_size: blocks that go through a layer at once.
            attention: the attribute of a layer that holds its attention; by default, as
                `attention_name` has it.

        Raises:
            UserError: ids that the model does not know, or layers that are called with something
                that depends on the text.
        """
        self.model, self.attention_name = model, attention or attention_name(model)
        self.layers: list[nn.Module] = list(model.get_decoder().layers)
        self.arguments: list[dict[str, Any]] = []
        check_ids(model, blocks)
        blocks = blocks.to(device_of(model))
        self._capture(blocks[:1])
        starts = range(0, len(blocks), batch_size)
        self.batches = [slice(start, min(start + batch_size, len(blocks))) for start in starts]
        for batch in self.batches:
            entering = self._enter(blocks[batch])
            if batch.start == 0:
                self.states = entering.new_empty(len(blocks), *entering.shape[1:])
            self.states[batch] = entering

    def _capture(self, block: Tensor) -> None:
        """Takes down how the model calls its layers. All but the first hand on what they get, in
        the form in which the first returns it."""
        returned: list[Any] = []

        def record(
            layer: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> None:
            self.arguments.append(named_arguments(layer, positional, keywords)[1])
            returned.append(output)

        def hand_on(layer: nn.Module) -> Callable[..., Any]:
            def forward(*positional: Any, **keywords: Any) -> Any:
                hidden = named_arguments(layer, positional, keywords)[0]
                return (hidden, *returned[0][1:]) if isinstance(returned[0], tuple) else hidden

            return forward

        hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in self.layers]
        try:
            with standing_in({layer: hand_on(layer) for layer in self.layers[1:]}):
                self.model.get_decoder()(input_ids=block, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        self._in_tuples = isinstance(returned[0], tuple)

    def _enter(self, blocks: Tensor) -> Tensor:
        """Hidden states before the first layer: [b, L] token ids -> [b, L, D]."""
        decoder = self.model.get_decoder()
        hidden, keywords = arguments_at(
            self.layers[0], lambda: decoder(input_ids=blocks, use_cache=False)
        )
        for name, captured in self.arguments[0].items():
            if not _same(captured, keywords.get(name)):
                raise UserError(
                    f"the layers of {type(self.model).__name__} are called with {name}, which "
                    "depends on the text: such models cannot be run layer by layer"
                )
        return hidden

    def attention(self, index: int) -> nn.Module:
        """The attention module of a layer."""
        return getattr(self.layers[index], self.attention_name)

    def run(self, index: int, hidden: Tensor, layer: nn.Module | None = None) -> Tensor:
        """Hidden states [b, L, D] after layer `index`, or after another layer in its place."""
        return first((layer or self.layers[index])(hidden, **self.arguments[index]))

    def attention_input(self, index: int, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What a layer's attention is called with where [b, L, D] enters the layer: its hidden
        states [b, L, D], and everything else by name. Nothing after that is run."""
        return arguments_at(self.attention(index), lambda: self.run(index, hidden))

    @torch.no_grad()
    def observe(self, index: int) -> Iterator[AttentionCall]:
        """Takes the states through layer `index`, as far as this is consumed: yields what its
        attention did in each of `batches`."""
        attention, calls = self.attention(index), list[AttentionCall]()

        def record(
            module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> None:
            hidden, keywords = named_arguments(module, positional, keywords)
            calls.append(AttentionCall(hidden, keywords, first(output)))

        for batch in self.batches:
            hook = attention.register_forward_hook(record, with_kwargs=True)
            try:
                # Where no norm stands before the attention its input is what enters the layer, and
                # has to outlive what takes its place in `states`.
                self.states[batch] = self.run(index, self.states[batch].clone())
            finally:
                hook.remove()
            yield calls.pop()

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Takes the states through layer `index`."""
        for batch in self.batches:
            self.states[batch] = self.run(index, self.states[batch])

    @contextmanager
    def _ending_with(self, hidden: Tensor) -> Iterator[Tensor]:
        """The model's last layer gives [b, t, D], whatever is put in: a token id for that."""

        def layer(*_: Any, **__: Any) -> Any:
            return (hidden,) if self._in_tuples else hidden

        with standing_in(dict.fromkeys(self.layers, layer)):
            yield torch.zeros(1, 1, dtype=torch.long, device=hidden.device)

    def final(self, hidden: Tensor) -> Tensor:
        """What the output head sees where [b, t, D] leaves the last layer: [b, t, D]."""
        with self._ending_with(hidden) as token:
            return final_hidden_states(self.model, token)

    def all_logits(self, hidden: Tensor) -> Tensor:
        """The model's logits where [b, t, D] leaves the last layer, all at once: [b, t, V]."""
        with self._ending_with(hidden) as token:
            return self.model(input_ids=token, use_cache=False).logits

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """The model's logits where [b, t, D] leaves the last layer: [C, V], a few positions at a
        time, because a vocabulary can be large."""
        head, finish = self.model.get_output_embeddings(), logit_finish(self.model)
        for chunk in hidden.flatten(0, 1).split(chunk_positions(self.model)):
            product = F.linear(self.final(chunk[None])[0], head.weight)
            yield product if finish is None else finish(product)


def _same(one: Any, other: Any) -> bool:
    """Whether what a layer is called with for one block is what it is called with for others."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(
        not isinstance(left, Tensor)
        or (left.shape[1:] == right.shape[1:] and bool((left == right).all()))
        for left, right in pairs
    )
