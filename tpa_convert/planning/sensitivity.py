"""How much a model minds narrower keys or values: measured, one layer and one of the two at a time.

Everything but the part in question is the source itself, so that what is measured is that part's
own share of the loss.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tpa_convert.calibration.moments import Moments
from tpa_convert.conversion.layer import attention_module, convert_layer
from tpa_convert.decomposition import LayerMoments
from tpa_convert.decomposition.gauge import (
    key_components,
    truncation_errors,
    value_components,
    value_metric,
)
from tpa_convert.decomposition.latent import latent_components
from tpa_convert.forward.divergence import chunked_divergence
from tpa_convert.forward.head import logit_finish
from tpa_convert.forward.walk import DecoderWalk
from tpa_convert.modeling import KeyCache
from tpa_convert.plans import plan_widths
from tpa_convert.plans.allocation import interpolate_loss
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source
from tpa_convert.sources.attention import attention_weights

SHARES = (0.25, 0.5, 0.75)  # of the source's width, where the loss is measured
BATCH_TOKENS = 8192
POSITION_STRIDE = 4  # neighbours are alike, and logits cost more than layers in a small model


@dataclass(frozen=True)
class PartSensitivity:
    """Loss of the model when only the keys, or only the values, of one layer are narrowed.

    Attributes:
        error: squared truncation error of the decomposition at widths 0, `step`, 2 `step`, ...,
            fp64.
        step: 2 for rotated keys (a rotary pair), 1 for latent keys and for values.
        widths: where the loss was measured, ascending.
        losses: KL(source ‖ model) in nats per token, at `widths`.
    """

    error: Tensor
    step: int
    widths: tuple[int, ...]
    losses: tuple[float, ...]

    def loss(self, widths: Tensor) -> Tensor:
        """Nats per token at any `widths` (multiples of `step`), fp64, of the same shape."""
        error = self.error / self.error[0]
        measured = torch.tensor(self.widths[::-1]) // self.step  # errors ascend as widths descend
        losses = torch.tensor(self.losses[::-1], dtype=torch.float64)
        flat = interpolate_loss(error[widths.flatten() // self.step], error[measured], losses)
        return flat.view(widths.shape)


@dataclass(frozen=True)
class LayerSensitivity:
    """Of the keys and of the values of one layer."""

    keys: PartSensitivity
    values: PartSensitivity


class _Losses:
    """Divergence from the source where another attention stands in for that of one of its layers.

    Its walk's states enter the layer in question.
    """

    def __init__(self, source: PreTrainedModel, blocks: Tensor, attention: str):
        size = max(1, BATCH_TOKENS // blocks.shape[1])
        self.walk = DecoderWalk(source, blocks, size, attention)
        self.head, self.finish = source.get_output_embeddings().weight, logit_finish(source)
        self.final = [self.run(self.walk.states[batch], 0) for batch in self.walk.batches]

    def run(self, hidden: Tensor, start: int) -> Tensor:
        """What the output head sees at some positions where [b, L, D] enters layer `start`."""
        for index in range(start, len(self.walk.layers)):
            hidden = self.walk.run(index, hidden)
        return self.walk.final(hidden[:, ::POSITION_STRIDE])

    def with_attention(self, attention: nn.Module, index: int) -> float:
        """KL from the source when `attention` stands in for that of layer `index`."""
        layer, name = self.walk.layers[index], self.walk.attention_name
        original = self.walk.attention(index)
        setattr(layer, name, attention.to(self.head.device))
        try:
            total = 0.0
            for batch, final in zip(self.walk.batches, self.final, strict=True):
                hidden = self.run(self.walk.states[batch], index)
                mean = chunked_divergence(
                    hidden,
                    self.head,
                    final,
                    self.head,
                    student_finish=self.finish,
                    teacher_finish=self.finish,
                ).item()
                total += mean * len(hidden)
        finally:
            setattr(layer, name, original)
        return total / len(self.walk.states)


@torch.no_grad()
def measure_sensitivity(
    source: Source,
    moments: Moments,
    blocks: Tensor,
    *,
    key_cache: KeyCache = "rotated",
    track: Track = no_tracking,
) -> list[LayerSensitivity]:
    """Sensitivity of every layer of `source`, on text that the moments have not seen.

    The time grows with the square of the number of layers: each measurement runs the rest of the
    model.

    Args:
        source: a model in fp32.
        moments: of the source on calibration text.
        blocks: token ids, int64 [N, length].
        key_cache: which kind of keys is narrowed.
        track: shows progress over the layers.
    """
    sizes = source.family.attention_sizes(source.model.config)
    width = sizes["num_key_value_heads"] * sizes["head_dim"]
    widths = tuple(max(2, round(share * width / 2) * 2) for share in SHARES)

    family, model = source.family, source.model

    def config(width_k: int, width_v: int) -> Any:
        plan = plan_widths([(width_k, width_v)] * len(layers), sizes, key_cache=key_cache)
        return family.tpa_config(model.config, [asdict(shape) for shape in plan.layers])

    layers = moments.layers
    narrow_keys = [config(narrow, width) for narrow in widths]
    narrow_values = [config(width, narrow) for narrow in widths]
    losses = _Losses(model, blocks, family.names.attention)
    report = []
    for i in track(range(len(layers)), "measuring sensitivity"):
        original, layer_moments = losses.walk.attention(i), layers[i]
        weights = attention_weights(original, family.names, model.config, i, device="cpu")

        key_losses, value_losses = (
            tuple(
                losses.with_attention(_narrowed(source, original, c, i, layer_moments), i)
                for c in configs
            )
            for configs in (narrow_keys, narrow_values)
        )
        latent = key_cache == "latent"
        components = latent_components if latent else key_components
        key_error = truncation_errors(components(layer_moments)[0])
        value_error = truncation_errors(value_components(layer_moments, value_metric(weights))[0])
        report.append(
            LayerSensitivity(
                PartSensitivity(key_error, 1 if latent else 2, widths, key_losses),
                PartSensitivity(value_error, 1, widths, value_losses),
            )
        )
        losses.walk.advance(i)
    return report


def _narrowed(
    source: Source, original: nn.Module, config: Any, index: int, moments: LayerMoments
) -> nn.Module:
    """The converted attention of layer `index`, in fp32.

    Args:
        original: the source's attention of that layer.
        config: of the converted model; learns the rotary pairs of the layer's components.
    """
    names = source.family.names
    weights = attention_weights(original, names, source.model.config, index, device="cpu")
    shape = config.layer_shape(index)
    parameters, shape = convert_layer(weights, moments, shape, method="gauge", whiten=True)
    config.tpa_layers[index] = asdict(shape)
    return attention_module(original, names, config, index, parameters)
