"""A coded cache: moments and a budget of bytes to the codes of every layer, and to parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tpa_convert.coding import (
    LEVELS,
    CacheMoments,
    Part,
    RowTable,
    coded_order,
    component_energies,
    design_quantiser,
    fisher_metric,
    groups_of_bits,
    pair_blocks,
    part_of,
    predict_values,
    remaining_error,
    share_bytes,
    share_rows,
)
from tpa_convert.decomposition import AttentionWeights
from tpa_convert.modeling import CLASSES, LayerShape, RowLayout, codes_of, groups_of
from tpa_convert.plans import Plan

Groups = list[list[tuple[int, int]]]
"""(bits, components) of each run of codes, in each block of a part."""

ROUNDS = 2  # the bits of the keys decide what they say of the values, and the other way round


class CodedLayer:
    """What is known of a layer before its bits are: components, energies, and metrics.

    Args:
        moments: of the layer, where everything is computed.
        tokens: that the moments are of.
        blocks: of rotary pairs, for the keys.
        head_dim: of the source.
    """

    def __init__(self, moments: CacheMoments, tokens: int, blocks: int, head_dim: int):
        self.moments, self.width = moments, len(moments.mean) // 2
        self.key_metric = fisher_metric(moments.key_metric, tokens, moments.key_size)
        self.value_metric = fisher_metric(moments.value_metric, tokens)
        self.blocks = pair_blocks(self.width // head_dim, head_dim, blocks)

    @property
    def _key_covariance(self) -> Tensor:
        return self.moments.covariance[: self.width, : self.width]

    @cached_property
    def keys(self) -> Part:
        """Components of the keys."""
        return part_of(self._key_covariance, self.key_metric, self.blocks)

    @property
    def key_energies(self) -> list[Tensor]:
        """Of the keys, by block, without their components."""
        return component_energies(self._key_covariance, self.key_metric, self.blocks)

    def value_energies(self, groups: Groups | None) -> list[Tensor]:
        """As `key_energies`, of the values; `groups` as in `values`."""
        return component_energies(self._unpredicted(groups)[0], self.value_metric)

    def values(self, groups: Groups | None) -> tuple[Part, Tensor | None]:
        """Components of the values, and the weight [n, c] that predicts them.

        Args:
            groups: of the codes of the keys, for values that are predicted from these; else None.
        """
        residual, weight = self._unpredicted(groups)
        return part_of(residual, self.value_metric), weight

    def _unpredicted(self, groups: Groups | None) -> tuple[Tensor, Tensor | None]:
        """Covariance [n, n] of what the keys do not say of the values, and the weight."""
        covariance = self.moments.covariance
        if groups is None:
            return covariance[self.width :, self.width :], None
        bits = torch.tensor([bits for runs in groups for bits, m in runs for _ in range(m)])
        order, bits = coded_order(self.keys, groups), bits.to(covariance.device)
        weight, residual = predict_values(self.keys, order, bits, covariance)
        return residual, weight


class Codes(NamedTuple):
    """A plan with its codes, and the loss that those of each layer are expected to cause, in nats a
    token."""

    plan: Plan
    layer_nats: tuple[float, ...]

    @property
    def nats(self) -> float:
        """Of all layers."""
        return sum(self.layer_nats)


def choose_codes(
    plan: Plan,
    moments: Sequence[CacheMoments],
    tokens: int,
    *,
    device: torch.device | str = "cpu",
) -> Codes:
    """Codes for the keys and values of every layer, from one budget and in one unit, nats.

    Args:
        plan: whose codes are still to be chosen.
        moments: of every layer, of this many `tokens`; one is asked for at a time.
        device: where to decompose.
    """
    assert plan.coded is not None
    budget, predicted = plan.coded, plan.coded.predict_values
    total, align = budget.total_bytes, budget.align

    def known(index: int) -> CodedLayer:
        there = moments[index].to(device)
        return CodedLayer(there, tokens, budget.key_blocks, plan.head_dim)

    def best_rows(energies: list[Tensor]) -> RowTable:
        return RowTable.of(energies, total, align, LEVELS)

    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    for index in range(len(moments)):  # moments may be large: of one layer at a time
        layer = known(index)
        keys.append(layer.key_energies)
        values.append(layer.value_energies(None))
        del layer
    # Which components are kept of all depends on those of the values, where a mean is asked for.
    key_rows = [] if budget.bits else [best_rows(energies) for energies in keys]
    for _ in range(1 + ROUNDS * predicted):
        parts = [e for pair in zip(keys, values, strict=True) for e in pair]
        if budget.bits:
            bits = share_bytes(parts, total, align, mean=budget.bits)
        else:
            pairs = zip(key_rows, values, strict=True)
            bits = share_rows([r for k, v in pairs for r in (k, best_rows(v))], total, align)
        key_groups = [[groups_of_bits(block)[0] for block in part] for part in bits[::2]]
        if predicted:
            values = [known(i).value_energies(g) for i, g in enumerate(key_groups)]
    part_nats = [
        sum(remaining_error(e, b).item() / 2 for e, b in zip(energies, found, strict=True))
        for energies, found in zip(parts, bits, strict=True)
    ]
    layer_nats = tuple(map(sum, zip(part_nats[::2], part_nats[1::2], strict=True)))
    return Codes(with_codes(plan, bits), layer_nats)


def with_codes(plan: Plan, bits: Sequence[Sequence[Tensor]]) -> Plan:
    """A plan whose codes are chosen.

    Args:
        plan: whose codes are still to be chosen.
        bits: of the components of each block of the keys and then of the values of each layer in
            turn, int64 [c] each.
    """
    assert plan.coded is not None
    groups = [[groups_of_bits(block)[0] for block in part] for part in bits]
    shapes = [
        replace(
            shape,
            width_k=sum(n for runs in keys for _, n in runs),
            width_v=sum(n for runs in values for _, n in runs),
            key_codes=codes_of(keys),
            value_codes=codes_of(values),
            row_align=plan.coded.align,
            predict_values=plan.coded.predict_values,
        )
        for shape, keys, values in zip(plan.layers, groups[::2], groups[1::2], strict=True)
    ]
    return replace(plan, layers=shapes, coded=None)


def coded_parameters(
    weights: AttentionWeights, moments: CacheMoments, tokens: int, shape: LayerShape
) -> dict[str, Tensor]:
    """Parameters of the keys and values of a coded layer, by their names in `TPAAttention`; where
    the weights are."""
    heads, head_dim, _ = weights.key.shape
    n, key_groups = heads * head_dim, groups_of(shape.key_codes)
    moments = moments.to(weights.key.device)
    layer = CodedLayer(moments, tokens, len(key_groups), head_dim)
    values, prediction = layer.values(key_groups if shape.predict_values else None)
    key = _part_parameters(
        "keys", layer.keys, key_groups, shape.key_layout, weights.key,
        moments.mean[:n], moments.sink_mean[:n] - moments.mean[:n],
    )  # fmt: skip
    value = _part_parameters(
        "values", values, groups_of(shape.value_codes), shape.value_layout, weights.value,
        moments.mean[n:], moments.sink_mean[n:] - moments.mean[n:],
    )  # fmt: skip
    gauge, sink, offset = key.pop("gauge"), key.pop("sink"), key.pop("offset")
    in_blocks = pair_blocks(heads, head_dim, len(key_groups))
    columns = gauge.split(shape.key_block_widths, dim=1)
    blocks = [part[index] for part, index in zip(columns, in_blocks, strict=True)]
    key["keys.gauge.weight"] = torch.cat(blocks, dim=1).unflatten(0, (heads, -1))
    key["keys.gauge.shared.weight"] = sink.unflatten(0, (heads, -1))
    key["keys.gauge.shared.offset"] = offset.unflatten(0, (heads, -1))
    feature = value.pop("feature")
    gauges = [value.pop("gauge"), value.pop("sink")]
    if prediction is not None:
        known = torch.nn.functional.pad(prediction, (0, CLASSES - 1))
        gauges.append(known)
        value["values.key_prediction.weight"] = feature @ known
    value["values.gauge.weight"] = torch.cat(gauges, dim=1).unflatten(0, (heads, -1))
    value["values.gauge.offset"] = value.pop("offset").unflatten(0, (heads, -1))
    del key["feature"]
    return key | value


def _part_parameters(
    name: str,
    part: Part,
    groups: Groups,
    layout: RowLayout,
    weight: Tensor,
    mean: Tensor,
    sink: Tensor,
) -> dict[str, Tensor]:
    """What codes one part, and under short names what its gauge is made of.

    Args:
        weight: homogeneous, [g, d, D + 1].
        mean: of ordinary tokens, [n].
        sink: mean of sinks less that, [n].
    """
    order = coded_order(part, groups)
    feature = part.components.feature[order]
    projection = feature @ weight.flatten(0, 1)
    projection[:, -1] -= feature @ mean
    quantiser = design_quantiser(part, sink, order, layout)
    return {
        f"{name}.feature_factor.weight": projection[:, :-1],
        f"{name}.feature_factor.bias": projection[:, -1],
        f"{name}.coder.mean": quantiser.mean,
        f"{name}.coder.step": quantiser.step,
        f"{name}.coder.spread": quantiser.spread,
        f"{name}.coder.importance": quantiser.importance,
        "feature": feature,
        "gauge": part.components.gauge[:, order],
        "sink": sink[:, None],
        "offset": mean,
    }
