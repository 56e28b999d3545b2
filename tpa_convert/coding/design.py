"""From moments of keys and values to what codes them: transforms, quantisers, prediction.

Measured on SmolLM2-135M (benchmarks/notes/2026-11-26-coded-spike.md): the steps of a Gaussian are
as good as steps by Lloyd's algorithm once every token has a scale; two classes of tokens are as
good as more, and the second needs a mean of its own but no steps, since the scale makes up for its
spread.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tpa_convert.coding.allocation import GAUSSIAN_ERROR, GAUSSIAN_STEP, LEVELS
from tpa_convert.coding.components import Components, principal_components
from tpa_convert.modeling.tpa_codes import Quantiser, RowLayout, highest_codes


class Part(NamedTuple):
    """The keys or the values of one layer, n numbers x, as components to be coded.

    Attributes:
        components: n of them, block after block.
        spread: standard deviation of each component over ordinary tokens, [n].
        blocks: components of each block.
    """

    components: Components
    spread: Tensor
    blocks: list[int]

    @property
    def energies(self) -> list[Tensor]:
        """What leaving a component out would cost, for each block."""
        energy = self.components.importance * self.spread.square()
        return list(energy.split(self.blocks))


def part_of(covariance: Tensor, metric: Tensor, blocks: list[Tensor] | None = None) -> Part:
    """The Karhunen-Loève components of numbers with this covariance, in a metric, [n, n] each;
    inside blocks of features if there are several."""
    found = principal_components(covariance, metric, blocks)
    variance = torch.einsum("wn,nm,wm->w", found.feature, covariance, found.feature)
    sizes = [len(covariance)] if blocks is None else [len(block) for block in blocks]
    return Part(found, variance.clamp_min(0).sqrt(), sizes)


def coded_order(part: Part, groups: list[list[tuple[int, int]]]) -> Tensor:
    """Which components have codes, in the order of their rows, int64: in each block those of most
    energy get the most bits.

    Args:
        groups: (bits, components) of each run in each block.
    """
    found, first = [], 0
    for energy, runs in zip(part.energies, groups, strict=True):
        count = sum(n for _, n in runs)
        found.append(first + energy.argsort(descending=True, stable=True)[:count])
        first += len(energy)
    return torch.cat(found)


def design_quantiser(part: Part, sink: Tensor, order: Tensor, layout: RowLayout) -> Quantiser:
    """The quantiser of the coded components, around the mean of ordinary tokens.

    Args:
        sink: mean of sinks less that of ordinary tokens, [n].
        order: of the components with codes, [c].
        layout: of their rows.
    """
    components = part.components
    bits = torch.tensor(layout.bits, device=order.device)
    # Only ratios matter, and nats themselves may be too small for float16.
    importance = components.importance[order] / components.importance[order].max()
    # Nothing is coded finer than the strongest component can be. One that never varied would else
    # have a step next to zero: the least change of the weights, and it alone would set the scale of
    # its token.
    spread = part.spread[order]
    largest = (importance * spread.square()).max().sqrt()
    finest = torch.where(largest > 0, largest, 1.0) / 2 ** max(LEVELS)
    spread = spread.maximum(finest / importance.sqrt().clamp_min(2.0 ** -max(LEVELS)))
    sink_mean = components.feature[order] @ sink
    mean = torch.stack((torch.zeros_like(sink_mean), sink_mean))
    step = spread * spread.new_tensor(GAUSSIAN_STEP)[bits]
    return Quantiser(
        layout,
        mean.float(),
        step.float(),
        spread.float(),
        importance.float(),
        highest_codes(layout).to(order.device),
    )


class Prediction(NamedTuple):
    """What the decoded components of a token's keys say of its values.

    Attributes:
        weight: values - mean ≈ weight · decoded components, [n, c].
        residual: covariance of what that leaves, [n, n].
    """

    weight: Tensor
    residual: Tensor


def predict_values(
    keys: Part, order: Tensor, bits: Tensor, covariance: Tensor, ridge: float = 0.01
) -> Prediction:
    """Predictive coding in closed loop: the decoder knows the decoded keys, so no error adds up.

    Codes of the least squared error are D b plus noise, with D = 1 - ε(bits) and noise of variance
    ε (1 - ε) σ²; that gives the moments of decoded components from those of the components.

    Args:
        keys: the components of the keys.
        order: those of them with codes, [c].
        bits: of these, [c].
        covariance: of keys and values together, [2 n, 2 n].
        ridge: damping, relative to the mean variance of a decoded component.
    """
    n = len(covariance) // 2
    feature = keys.components.feature[order]
    error = feature.new_tensor(GAUSSIAN_ERROR)[bits]
    kept = 1 - error
    components = kept[:, None] * feature
    variance = torch.einsum("cn,nm,cm->c", feature, covariance[:n, :n], feature)
    moment = components @ covariance[:n, :n] @ components.mT + (error * kept * variance).diag()
    shared = components @ covariance[:n, n:]  # [c, n]
    mean = moment.diagonal().mean().clamp_min(1e-30)  # 0 of keys that never vary
    damped = moment.clone()
    damped.diagonal().add_(ridge * mean)
    weight = torch.linalg.solve(damped, shared).mT
    explained = weight @ shared
    residual = covariance[n:, n:] - explained - explained.mT + weight @ moment @ weight.mT
    return Prediction(weight, residual)
