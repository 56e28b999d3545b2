"""How much a model minds narrower keys or values: measured, one layer and one of the two at a time.

Everything but the part in question is the source itself, so that what is measured is that part's
own share of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tpa_convert.calibration.moments import Moments
from tpa_convert.conversion.model import convert_layer
from tpa_convert.decomposition import AttentionWeights, LayerMoments
from tpa_convert.decomposition.gauge import (
    key_components,
    truncation_errors,
    value_components,
    value_metric,
)
from tpa_convert.decomposition.latent import latent_components
from tpa_convert.forward.divergence import chunked_divergence
from tpa_convert.forward.head import logit_finish
from tpa_convert.forward.walk import ATTENTION, DecoderWalk
from tpa_convert.modeling import KeyCache, TPAConfig
from tpa_convert.modeling.modeling_tpa import TPAAttention
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
    attention: str = ATTENTION,
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
        attention: name of the attention module in a layer.
        track: shows progress over the layers.
    """
    llama_config = source.architecture.llama_config(source.model.config)
    width = llama_config["num_key_value_heads"] * llama_config["head_dim"]
    widths = tuple(max(2, round(share * width / 2) * 2) for share in SHARES)

    def config(width_k: int, width_v: int) -> TPAConfig:
        pairs = [(width_k, width_v)] * len(moments.layers)
        plan = plan_widths(pairs, llama_config, key_cache=key_cache)
        scale = source.architecture.attention_scale(source.model.config)
        result = TPAConfig(**llama_config, **plan.config_fields(), attention_scale=scale)
        result._attn_implementation = "sdpa"
        return result

    narrow_keys = [config(narrow, width) for narrow in widths]
    narrow_values = [config(width, narrow) for narrow in widths]
    state = source.architecture.llama_state_dict(source.model)
    state = {name: tensor.cpu() for name, tensor in state.items() if "self_attn" in name}
    losses = _Losses(source.model, blocks, attention)
    report = []
    for i in track(range(len(moments.layers)), "measuring sensitivity"):
        weights, layer_moments = attention_weights(source, state, i), moments.layers[i]
        key_losses, value_losses = (
            tuple(
                losses.with_attention(_attention(c, i, weights, layer_moments), i) for c in configs
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


def _attention(
    config: TPAConfig, layer: int, weights: AttentionWeights, moments: LayerMoments
) -> TPAAttention:
    """The converted attention of one layer, in fp32 on the CPU."""
    state, _ = convert_layer(
        weights, moments, config.layer_shape(layer), method="gauge", whiten=True
    )
    with torch.device("meta"):
        attention = TPAAttention(config, layer)
    expected = attention.state_dict().keys()
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    attention.load_state_dict({k: state[k] for k in expected}, assign=True)
    return attention.eval()
