"""Moments of keys and values for a coded cache: how they vary, and what an error of them costs.

One forward and one backward pass over calibration text, with labels drawn from the model itself:
with g the gradient of -log p(label) by a token's keys (or values), E[g gᵀ] is the Fisher metric,
in which an error costs nats (`coding.components`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tpa_convert.calibration.moments import Moments
from tpa_convert.coding import CacheMoments
from tpa_convert.conversion.layer import attention_module, attention_parameters
from tpa_convert.decomposition import LatentKeyFactors, ValueFactors
from tpa_convert.forward.ids import check_ids
from tpa_convert.modeling import TPAAttention
from tpa_convert.plans.coded import full_width_shape
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source
from tpa_convert.sources.attention import attention_weights

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

    def finish(self) -> CacheMoments:
        """The moments, rounded as a file keeps them: with other ones, other codes would follow."""
        tokens = self.sums["tokens"]
        mean = self.sums["first"] / tokens
        moments = (
            mean,
            self.sums["second"] / tokens - mean.outer(mean),
            self.sums["key"] / tokens,
            self.sums["value"] / tokens,
            self.sums["sink"] / self.sums["sinks"],
        )
        return CacheMoments(*(moment.float().double().cpu() for moment in moments))


@contextmanager
def full_width(source: Source) -> Iterator[list[TPAAttention]]:
    """Puts latent keys and values of full width, whose gauge is the identity, into the source's
    own decoder: they give keys and values one form, whatever the family. Undone on leaving."""
    model, family = source.model, source.family
    decoder, names = model.get_decoder(), family.names
    shape = full_width_shape(family.attention_sizes(model.config))
    config = family.tpa_config(model.config, [asdict(shape)] * len(decoder.layers))
    config._attn_implementation = model.config._attn_implementation
    before = [getattr(layer, names.attention) for layer in decoder.layers]
    modules = []
    for i, attention in enumerate(before):
        weights = attention_weights(attention, names, model.config, i, dtype=torch.float32)
        groups, head_dim, _ = weights.key.shape
        gauge = torch.eye(groups * head_dim).to(weights.key).unflatten(0, (groups, head_dim))
        keys = LatentKeyFactors(weights.key.flatten(0, 1), gauge, gauge[..., 0] * 0)
        values = ValueFactors(weights.value.flatten(0, 1), gauge)
        parameters = attention_parameters(
            weights, keys, values, shape, weights.key.new_zeros(weights.key.shape[-1] - 1)
        )
        module = attention_module(attention, names, config, i, parameters)
        modules.append(module.to(weights.key.device, model.dtype).requires_grad_(False))
    try:
        for layer, module in zip(decoder.layers, modules, strict=True):
            setattr(layer, names.attention, module)
        yield modules
    finally:
        for layer, attention in zip(decoder.layers, before, strict=True):
            setattr(layer, names.attention, attention)


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
) -> Moments:
    """`CacheMoments` of every layer of `source` on `blocks`.

    Args:
        blocks: token ids, int64 [N, length].
        batch_size: blocks per step, fewer for large vocabularies.
        seed: of the labels.
        track: shows progress over the batches, called as `track(batches, description)`.
    """
    source.family.check_names(source.model)
    model = source.model
    check_ids(model, blocks)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    batch_size = max(1, min(batch_size, MOST_LOGITS // (vocabulary * blocks.shape[1])))
    generator = torch.Generator(model.device).manual_seed(seed)
    with full_width(source) as modules:
        taps = [
            [_Tap(module.keys.feature_factor), _Tap(module.values.feature_factor)]
            for module in modules
        ]
        sums = [CacheMomentAccumulator() for _ in modules]
        for batch in track(list(blocks.split(batch_size)), "calibrating"):
            batch = batch.to(model.device)
            with torch.enable_grad():
                logits = model(input_ids=batch, use_cache=False).logits.float()
                with torch.no_grad():
                    probability = logits.softmax(-1).flatten(0, 1)
                    label = torch.multinomial(probability, 1, generator=generator)
                    del probability
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, 1), label[:, 0], reduction="sum"
                )
                changes = [tap.change for pair in taps for tap in pair]
                gradients = torch.autograd.grad(loss, changes, materialize_grads=True)
            of_keys, of_values = gradients[::2], gradients[1::2]
            for layer, pair, *gradient in zip(sums, taps, of_keys, of_values, strict=True):
                layer.update(
                    torch.cat([tap.value for tap in pair], dim=-1), torch.cat(gradient, dim=-1)
                )
        for tap in (tap for pair in taps for tap in pair):
            tap.hook.remove()
    return Moments([layer.finish() for layer in sums], source.reference.sha256, blocks.numel())
