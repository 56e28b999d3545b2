"""One table of rotary pairs for all layers, for software that has only one (a stock Llama)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tpa_convert.conversion.model import Moments
from tpa_convert.decomposition.gauge import key_components
from tpa_convert.decomposition.moments import LayerMoments
from tpa_convert.plans import Plan


def share_pairs(plan: Plan, moments: Moments) -> Plan:
    """The plan with as many key components on every rotary pair as in all other layers.

    Components are taken in one order for all: by the share of its keys' energy that a layer keeps
    with the n-th strongest component of a pair, summed over the layers. A narrower layer takes
    fewer of the same order, so that the widest one has all pairs that the table needs.

    Args:
        plan: static layers with rotated keys.
        moments: of the source.
    """
    gains = torch.stack([_shares(layer) for layer in moments.layers])
    total = gains.sum(0)  # [f, g], falling along g
    order = total.flatten().argsort(descending=True, stable=True) // total.shape[1]
    layers = []
    for shape in plan.layers:
        counts = order[: shape.width_k // 2].bincount(minlength=len(total))
        layers.append(replace(shape, key_pairs=" ".join(map(str, counts.tolist()))))
    return replace(plan, layers=layers)


def _shares(moments: LayerMoments) -> Tensor:
    """Shares of the energy of a layer's keys in each component, [f, g], strongest first."""
    energies, _ = key_components(moments)
    return energies.flip(1) / energies.sum().clamp_min(torch.finfo(energies.dtype).tiny)
