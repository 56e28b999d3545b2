"""Coded layers made equally wide while they are trained, so that one compiled graph serves all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tpa_convert.forward.walk import attention_modules
from tpa_convert.modeling import CLASSES, TPAAttention
from tpa_convert.modeling.tpa_coder import RowCoder
from tpa_convert.modeling.tpa_codes import round_up
from tpa_convert.modeling.tpa_gauges import BlockGauge
from tpa_convert.modeling.tpa_keys import LatentKeys

MULTIPLE_OF = 16


@contextmanager
def even_widths(student: PreTrainedModel) -> Iterator[None]:
    """Pads the components of coded keys and values to the width of the widest layer.

    What is added is zero, gets gradients that are zero, and has one code, which says nothing. The
    rows of a padded layer cannot be packed; it is for training, without a cache. Undone on leaving.
    """
    layers = [
        module
        for module in attention_modules(student)
        if isinstance(module, TPAAttention) and module.shape.coded
    ]
    blocks = [layer.shape.key_block_widths for layer in layers]
    if not layers or len({len(widths) for widths in blocks}) > 1:
        yield
        return
    key_widths = [round_up(max(widths), MULTIPLE_OF) for widths in zip(*blocks, strict=True)]
    value_width = round_up(max(layer.shape.width_v for layer in layers), MULTIPLE_OF)
    places = [
        (_places(layer.shape.key_block_widths, key_widths), torch.arange(layer.shape.width_v))
        for layer in layers
    ]
    for layer, (keys, values) in zip(layers, places, strict=True):
        _resize(layer, _Spread(keys, sum(key_widths)), _Spread(values, value_width), key_widths)
    try:
        yield
    finally:
        for layer, (keys, values) in zip(layers, places, strict=True):
            _resize(layer, _Gather(keys), _Gather(values), layer.shape.key_block_widths)


def _places(widths: list[int], wider: list[int]) -> Tensor:
    """Where the components of blocks of these widths go among those of wider blocks."""
    starts = accumulate([0, *wider[:-1]])
    return torch.cat(
        [start + torch.arange(width) for start, width in zip(starts, widths, strict=True)]
    )


class _Spread:
    """Puts the components of a tensor in their places among `width`, with zeros between."""

    def __init__(self, places: Tensor, width: int):
        self.places, self.width = places, width

    def __call__(self, x: Tensor, dim: int, fill: float = 0.0) -> Tensor:
        shape = list(x.shape)
        shape[dim] = self.width
        return x.new_full(shape, fill).index_copy_(dim, self.places.to(x.device), x)


class _Gather:
    """Undoes `_Spread`."""

    def __init__(self, places: Tensor):
        self.places = places

    def __call__(self, x: Tensor, dim: int, fill: float = 0.0) -> Tensor:
        return x.index_select(dim, self.places.to(x.device))


@torch.no_grad()
def _resize(
    layer: TPAAttention,
    keys: _Spread | _Gather,
    values: _Spread | _Gather,
    key_widths: list[int],
) -> None:
    """Changes the components of one layer, wherever they occur."""
    assert isinstance(layer.keys, LatentKeys)
    assert isinstance(layer.keys.gauge, BlockGauge)
    assert layer.values.gauge is not None
    for part, change in ((layer.keys, keys), (layer.values, values)):
        _set(part.feature_factor, "weight", change(part.feature_factor.weight, 0))
        _set(part.feature_factor, "bias", change(part.feature_factor.bias, 0))
        assert isinstance(part.coder, RowCoder)
        part.coder.mean = change(part.coder.mean, 1)
        for name in ("step", "spread", "importance"):
            setattr(part.coder, name, change(getattr(part.coder, name), 0, 1.0))
        part.coder.highest = change(part.coder.highest, 0)
    _set(layer.keys.gauge, "weight", keys(layer.keys.gauge.weight, -1))
    layer.keys.gauge.widths = key_widths
    # Of values: their own components and classes, then those of the keys that predict them.
    gauge, indicators = layer.values.gauge, CLASSES - 1
    parts, changes = [gauge.weight], [values]
    if layer.values.key_prediction is not None:
        parts, changes = list(gauge.weight.split(gauge.widths, -1)), [values, keys]
        prediction = layer.values.key_prediction
        _set(prediction, "weight", _but_last(values(prediction.weight, 0), keys, indicators))
    resized = [_but_last(p, change, indicators) for p, change in zip(parts, changes, strict=True)]
    _set(gauge, "weight", torch.cat(resized, dim=-1))
    gauge.widths = [part.shape[-1] for part in resized]


def _but_last(x: Tensor, change: _Spread | _Gather, count: int) -> Tensor:
    """Changes the last dimension, all but its last `count` entries."""
    return torch.cat((change(x[..., :-count], -1), x[..., -count:]), dim=-1)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    requires_grad = getattr(module, name).requires_grad
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=requires_grad))
