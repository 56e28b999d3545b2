"""What a decoding step of the attention layers takes at least, predicted from bytes and operations.

A layer reads its weights and what is cached of the context, and computes on it; a device that does
both at once takes the longer of the two. Kernels take longer: those of rotated keys and of the
source by a tenth or two, those of coded caches many times as long, as was measured on an H100
(benchmarks/notes/2026-11-27-gpu.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpa_convert.plans.cost import layer_cost, source_cost
from tpa_convert.plans.plan import NUMBER_BYTES, Plan

AS_FAST = 1.01  # times that differ by less count as the same


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        name: of the device.
        bandwidth: bytes that a large copy reads and writes.
        operations: of a large bf16 product.
    """

    name: str
    bandwidth: float
    operations: float


# As measured (benchmarks/notes/2026-11-26-decode-attention.md); for plans that are made elsewhere.
H100 = Rates("an H100", 3.0e12, 7.2e14)


@dataclass(frozen=True)
class DecodeTime:
    """Predicts a step for `batch` sequences, each of which has cached `context` tokens.

    Attributes:
        sizes: `Family.attention_sizes` of the source.
        context: without windows: layers that have one read less.
    """

    sizes: Mapping[str, Any]
    context: int
    batch: int = 1
    rates: Rates = H100

    @property
    def of_source(self) -> float:
        """Seconds of the source's attention layers, with a cache in 16 bits."""
        layers = self.sizes["num_hidden_layers"]
        cost = source_cost({**self.sizes, "num_hidden_layers": 1}, self.context)
        numbers = 2 * self.sizes["num_key_value_heads"] * self.sizes["head_dim"]
        return layers * self._layer(cost.parameters, numbers * NUMBER_BYTES, cost.decode_flops)

    def of(self, plan: Plan) -> float:
        """Seconds of the attention layers of a plan.

        While codes are still to be chosen, all components count as kept: their operations are at
        most these.
        """
        groups, coded = self.sizes["num_key_value_heads"], plan.coded
        total = 0.0
        for shape in plan.layers:
            blocks, cached = None, float(shape.cached_bytes(groups))
            if coded is not None:
                blocks, cached = coded.key_blocks, coded.total_bytes / len(plan.layers)
            cost = layer_cost(shape, self.sizes, self.context, blocks)
            total += self._layer(cost.parameters, cached, cost.decode_flops)
        return total

    def _layer(self, parameters: float, cached_bytes: float, operations: float) -> float:
        read = NUMBER_BYTES * parameters + self.batch * self.context * cached_bytes
        return max(read / self.rates.bandwidth, self.batch * operations / self.rates.operations)
