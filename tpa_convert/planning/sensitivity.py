"""How much a model minds narrower keys or values: measured, one layer and one of the two at a time.

Everything but the part in question is the source itself, so that what is measured is that part's
own share of the loss. All narrowed models pass the layers side by side, so that each layer is read
once and none has to stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tpa_convert.calibration.moments import Moments
from tpa_convert.conversion.model import Conversion
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
from tpa_convert.sources import Source, held
from tpa_convert.sources.attention import attention_weights
from tpa_convert.storage import scratch

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
    names, model = source.family.names, source.model
    sizes = source.family.attention_sizes(model.config)
    full = sizes["num_key_value_heads"] * sizes["head_dim"]
    widths = tuple(max(2, round(share * full / 2) * 2) for share in SHARES)
    pairs = [*((width, full) for width in widths), *((full, width) for width in widths)]
    plans = [plan_widths([p] * len(moments.layers), sizes, key_cache=key_cache) for p in pairs]
    narrowed = [Conversion(source, plan, moments) for plan in plans]
    latent = key_cache == "latent"
    components = latent_components if latent else key_components
    errors = []
    walk = DecoderWalk(model, blocks, max(1, BATCH_TOKENS // blocks.shape[1]), names.attention)

    def passed(index: int, states: Tensor) -> Tensor:
        """States [N, L, D] behind a layer."""
        states = states.to(walk.states.device)
        return torch.cat([walk.run(index, states[batch]) for batch in walk.batches])

    with scratch(len(narrowed) * len(walk.layers) * walk.states.nbytes) as store:
        for index in track(range(len(walk.layers)), "measuring sensitivity"):
            with held(walk.layers[index]):
                for below in list(store):
                    store[below] = {"states": passed(index, store[below]["states"])}
                for number, conversion in enumerate(narrowed):
                    with conversion.in_place(index):
                        store[f"{index:05}-{number}"] = {"states": passed(index, walk.states)}
                weights = attention_weights(
                    walk.attention(index), names, model.config, index, device="cpu"
                )
                layer = moments.layers[index]
                keys, values = components(layer), value_components(layer, value_metric(weights))
                errors.append((truncation_errors(keys[0]), truncation_errors(values[0])))
                walk.advance(index)
        losses = _losses(walk, (store[name]["states"] for name in store))
    found = [tuple(losses[i : i + len(widths)]) for i in range(0, len(losses), len(widths))]
    return [
        LayerSensitivity(
            PartSensitivity(key_error, 1 if latent else 2, widths, key_losses),
            PartSensitivity(value_error, 1, widths, value_losses),
        )
        for (key_error, value_error), key_losses, value_losses in zip(
            errors, found[::2], found[1::2], strict=True
        )
    ]


def _losses(walk: DecoderWalk, narrowed: Iterable[Tensor]) -> list[float]:
    """KL from the source at some positions, nats per token.

    Args:
        walk: whose states [N, L, D] have left the last layer.
        narrowed: such states of other models.
    """

    def final(states: Tensor) -> Tensor:
        return walk.final(states[:, ::POSITION_STRIDE].to(walk.states.device))

    head, finish = walk.model.get_output_embeddings(), logit_finish(walk.model)
    with held(head):
        expected = final(walk.states)
        return [
            chunked_divergence(
                final(states),
                head.weight,
                expected,
                head.weight,
                student_finish=finish,
                teacher_finish=finish,
            ).item()
            for states in narrowed
        ]
