"""Quantisers from samples of components: classes of tokens, spreads, steps.

Measured on SmolLM2-135M (benchmarks/notes/2026-11-26-coded-spike.md): the steps of a Gaussian are
as good as steps by Lloyd's algorithm once every token has a scale; two classes are as good as more,
and the second needs a mean of its own but no steps, since the scale makes up for its spread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_convert.coding.allocation import GAUSSIAN_STEP, row_layout
from tpa_convert.coding.codes import Quantiser


def class_means(samples: Tensor, sink: Tensor) -> Tensor:
    """Means of sinks and of all other tokens.

    Which tokens of the calibration text are sinks may be told by their place (the first of each
    sequence); tokens to be coded are told by the nearest mean.

    Args:
        samples: components [N, c].
        sink: bool [N], some of each.

    Returns: [2, c], the others first.
    """
    return torch.stack((samples[~sink].mean(0), samples[sink].mean(0)))


def spreads(samples: Tensor, mean: Tensor, importance: Tensor) -> Tensor:
    """Root mean square of components [N, c] around the nearest of the class means [k, c]: [c]."""
    weighted = mean * importance
    label = ((mean * weighted).sum(-1) - 2 * samples @ weighted.mT).argmin(-1)
    return (samples - mean[label]).square().mean(0).sqrt()


def design_quantiser(
    spread: Tensor, mean: Tensor, importance: Tensor, bits: Tensor, align: int = 2
) -> tuple[Quantiser, Tensor]:
    """The quantiser of the components that have bits.

    Args:
        spread: around the class means, positive where there are bits, [c].
        mean: of the classes, [k, c].
        importance: [c].
        bits: int64 [c].
        align: what the bytes of each tier are padded to a multiple of.

    Returns: the quantiser and which components it codes, in its order, int64 [coded]. The others
        are constants: `class_offset`.
    """
    layout, order = row_layout(bits, align)
    step = spread * spread.new_tensor(GAUSSIAN_STEP)[bits]
    tensors = (mean[:, order], step[order], spread[order], importance[order])
    return Quantiser(layout, *(tensor.float().contiguous() for tensor in tensors)), order


def class_offset(gauge: Tensor, mean: Tensor, coded: Tensor) -> Tensor:
    """What the components without a code add to the numbers of each class: [k, n].

    Args:
        gauge: [n, c].
        mean: of all components, [k, c].
        coded: indices of those with a code.
    """
    rest = torch.ones(mean.shape[1], dtype=torch.bool, device=mean.device)
    rest[coded] = False
    return mean[:, rest] @ gauge[:, rest].mT
