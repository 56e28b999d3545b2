"""Moments of keys and values for a coded cache: how they vary, and what an error of them costs.

One forward and one backward pass over calibration text, with labels drawn from the model itself:
with g the gradient of -log p(label) by a token's keys (or values), E[g gᵀ] is the Fisher metric,
in which an error costs nats (`coding.components`).

Layers are passed one by one. What enters each is kept, and on the way back each is run again, now
with gradients: so no more than one layer and what it keeps for its gradients is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tpa_convert.calibration.moments import (
    Moments,
    StoredLayers,
    as_tensors,
    go_on,
    inputs_name,
    moments_name,
)
from tpa_convert.coding import CacheMoments
from tpa_convert.conversion.layer import attention_module, attention_parameters
from tpa_convert.decomposition import LatentKeyFactors, ValueFactors
from tpa_convert.forward.walk import DecoderWalk
from tpa_convert.modeling import TPAAttention
from tpa_convert.plans.coded import full_width_shape
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source, device_of, held
from tpa_convert.sources.attention import attention_weights
from tpa_convert.storage import Store, scratch

MOST_LOGITS = 2**27  # of a batch; what is kept of them for the backward pass is several times that


class CacheMomentAccumulator:
    """Sums of one layer over batches, in fp64 on the device of what it is given."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}

    def _add(self, name: str, value: Tensor | int) -> None:
        self.sums[name] = self.sums.get(name, 0) + value

    def update(self, numbers: Tensor, gradient: Tensor) -> None:
        """Adds keys and values side by side, [b, t, 2 n], and their gradients."""
        numbers, gradient = numbers.double(), gradient.double()
        self._add("sinks", len(numbers))
        self._add("sink", numbers[:, 0].sum(0))
        x, g = numbers[:, 1:].flatten(0, 1), gradient[:, 1:].flatten(0, 1)
        self._add("tokens", len(x))
        self._add("first", x.sum(0))
        self._add("second", x.mT @ x)
        for name, part in zip(("key", "value"), g.chunk(2, dim=-1), strict=True):
            self._add(name, part.mT @ part)

    def finish(self, key_size: Tensor) -> CacheMoments:
        """The moments in fp32, as a file keeps them: with other ones, other codes would follow.

        Args:
            key_size: as `CacheMoments` has it.
        """
        tokens = self.sums["tokens"]
        mean = self.sums["first"] / tokens
        moments = (
            mean,
            self.sums["second"] / tokens - mean.outer(mean),
            self.sums["key"] / tokens,
            self.sums["value"] / tokens,
            self.sums["sink"] / self.sums["sinks"],
            key_size,
        )
        return CacheMoments(*(moment.float().cpu() for moment in moments))


@contextmanager
def full_width(source: Source, index: int) -> Iterator[TPAAttention]:
    """Puts latent keys and values of full width, whose gauge is the identity, into a layer of the
    source's own decoder: they give keys and values one form, whatever the family. The layer is held
    until it is left, and then as it was."""
    model, family = source.model, source.family
    decoder, names = model.get_decoder(), family.names
    shape = full_width_shape(family.attention_sizes(model.config))
    config = family.tpa_config(model.config, [asdict(shape)] * len(decoder.layers))
    config._attn_implementation = model.config._attn_implementation
    layer = decoder.layers[index]
    with held(layer):
        before = getattr(layer, names.attention)
        weights = attention_weights(before, names, model.config, index, dtype=torch.float32)
        groups, head_dim, _ = weights.key.shape
        identity = torch.eye(groups * head_dim, device=weights.key.device)
        gauge = identity.unflatten(0, (groups, head_dim))
        keys = LatentKeyFactors(weights.key.flatten(0, 1), gauge, gauge[..., 0] * 0)
        values = ValueFactors(weights.value.flatten(0, 1), gauge)
        parameters = attention_parameters(
            weights, keys, values, shape, weights.key.new_zeros(weights.key.shape[-1] - 1)
        )
        module = attention_module(before, names, config, index, parameters)
        module = module.to(weights.key.device, model.dtype).requires_grad_(False)
        del weights, identity, gauge, keys, values, parameters
        setattr(layer, names.attention, module)
        try:
            yield module
        finally:
            setattr(layer, names.attention, before)


class _Tap:
    """A forward hook: what a module gives, and a zero added to it that takes its gradient."""

    def __init__(self, module: nn.Module):
        self.value: Tensor
        self.change: Tensor
        self.hook = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.value = output.detach()
        self.change = torch.zeros_like(output, requires_grad=True)
        return output + self.change


def collect_cache_moments(
    source: Source,
    blocks: Tensor,
    *,
    batch_size: int = 4,
    seed: int = 0,
    track: Track = no_tracking,
    store: Store | None = None,
) -> Moments:
    """`CacheMoments` of every layer of `source` on `blocks`.

    Args:
        blocks: token ids, int64 [N, length].
        batch_size: blocks per step, fewer for large vocabularies.
        seed: of the labels.
        track: shows progress over the layers, called as `track(layers, description)`.
        store: gets the moments, and meanwhile what enters every layer (fp32 numbers for each layer,
            token and hidden feature): what is in it already, from a run that was cut short, is not
            done again. By default, all of that is in memory or in temporary files.
    """
    source.family.check_names(source.model)
    model = source.model
    vocabulary = model.get_output_embeddings().weight.shape[0]
    batch_size = max(1, min(batch_size, MOST_LOGITS // (vocabulary * blocks.shape[1])))
    count = len(model.get_decoder().layers)
    kept = {} if store is None else store
    moments = Moments(
        StoredLayers(kept, CacheMoments, count), source.reference.sha256, blocks.numel()
    )
    if moments_name(0) in kept:  # the last to be measured
        return moments
    walk = DecoderWalk(model, blocks, batch_size, source.family.names.attention)
    with ExitStack() as until_done:
        inputs = store
        if inputs is None:
            inputs = until_done.enter_context(scratch(count * walk.states.nbytes))
        below = next((i for i in range(count + 1) if _gradient_name(i) in inputs), None)
        if below is None:
            _forward(source, walk, inputs, track)
            gradient = _gradient_of_labels(walk, seed)
            inputs[_gradient_name(count)] = {"gradient": gradient}
            below = count
        else:
            gradient = inputs[_gradient_name(below)]["gradient"].to(device_of(model))
        for i in track(range(below - 1, -1, -1), "calibrating (back)"):
            walk.states.copy_(inputs[inputs_name(i)]["states"])
            kept[moments_name(i)] = as_tensors(_backward(source, walk, i, gradient))
            inputs[_gradient_name(i)] = {"gradient": gradient.cpu()}
            inputs.pop(_gradient_name(i + 1), None)
            inputs.pop(inputs_name(i), None)
        inputs.pop(_gradient_name(0), None)
    return moments


def _gradient_name(index: int) -> str:
    """Of the gradient by what enters a layer in a store."""
    return f"gradient-{index:05}"


@torch.no_grad()
def _forward(source: Source, walk: DecoderWalk, inputs: Store, track: Track) -> None:
    """Keeps what enters each layer, and leaves what leaves the last in the walk's states."""
    for i in track(range(go_on(walk, inputs), len(walk.layers)), "calibrating"):
        if inputs_name(i) not in inputs:
            inputs[inputs_name(i)] = {"states": walk.states.to("cpu", copy=True)}
        with full_width(source, i):
            walk.advance(i)


def _gradient_of_labels(walk: DecoderWalk, seed: int) -> Tensor:
    """Of -log p(label), summed over tokens, by what leaves the last layer, [N, L, D]."""
    generator = torch.Generator(walk.states.device).manual_seed(seed)
    gradient = torch.empty_like(walk.states)
    with held(walk.model.get_output_embeddings()):
        for batch in walk.batches:
            with torch.enable_grad():
                hidden = walk.states[batch].requires_grad_()
                logits = walk.all_logits(hidden).float()
                with torch.no_grad():
                    probability = logits.softmax(-1).flatten(0, 1)
                    label = torch.multinomial(probability, 1, generator=generator)
                    del probability
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, 1), label[:, 0], reduction="sum"
                )
                del logits
                (gradient[batch],) = torch.autograd.grad(loss, hidden)
    return gradient


def _backward(source: Source, walk: DecoderWalk, index: int, gradient: Tensor) -> CacheMoments:
    """Moments of a layer that the walk's states are about to enter.

    Args:
        gradient: by what leaves the layer, [N, L, D]; becomes that by what enters it.
    """
    sums = CacheMomentAccumulator()
    with full_width(source, index) as module:
        taps = [_Tap(module.keys.feature_factor), _Tap(module.values.feature_factor)]
        for batch in walk.batches:
            with torch.enable_grad():
                hidden = walk.states[batch].requires_grad_()
                output = walk.run(index, hidden)
                gradient[batch], of_keys, of_values = torch.autograd.grad(
                    output,
                    [hidden, *(tap.change for tap in taps)],
                    gradient[batch],
                    materialize_grads=True,
                )
            sums.update(
                torch.cat([tap.value for tap in taps], dim=-1),
                torch.cat((of_keys, of_values), dim=-1),
            )
        return sums.finish(_key_size(module))


def _key_size(module: TPAAttention) -> Tensor:
    """`CacheMoments.key_size` of a layer."""
    weight = module.keys.feature_factor.weight.new_ones(module.keys.heads, module.head_dim)
    if module.keys.norm is not None:
        weight = weight * module.keys.norm.weights(weight.dtype)[1]
    return weight.flatten()
