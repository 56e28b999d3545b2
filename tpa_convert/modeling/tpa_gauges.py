"""Gauges of Tensor Product Attention: constant maps from components to heads; see `tpa_keys` for
letters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .tpa_coder import FEATURES
from .tpa_kernels import Kept

Heads = slice | None
"""Which key/value heads are to be rebuilt: a run of them, or None for all."""


def of_heads(x: torch.Tensor | None, heads: Heads, dim: int = 0) -> Any:
    """What belongs to these of all heads, which `dim` counts."""
    return x if x is None or heads is None else x[(slice(None),) * dim + (heads,)]


def as_wide_as(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Features with zeros behind them for the columns of a weight that they have not."""
    behind = weight.shape[-1] - features.shape[-1]
    return nn.functional.pad(features, (0, behind)) if behind else features


def in_whole_words(weight: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """A weight [..., w] with zeros behind each run of so many of its columns, as features have
    them: up to a multiple of `FEATURES`."""
    runs = weight.split(list(widths), -1)
    padded = [nn.functional.pad(run, (0, -run.shape[-1] % FEATURES)) for run in runs]
    return torch.cat(padded, -1) if len(padded) > 1 else padded[0]


def heads_of(
    features: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """Products [b, j, s, d] of features [b, 1, s, w] with a matrix for each head, [j, d, w], and
    the offset [j, d] of each.

    As a single product: a batched one would copy the features for every head.
    """
    groups, size, width = weight.shape
    bias = None if offset is None else offset.reshape(-1)
    heads = nn.functional.linear(features.squeeze(1), weight.reshape(groups * size, width), bias)
    return heads.view(*heads.shape[:2], groups, size).transpose(1, 2)


def each_head(
    features: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """Products [b, h, s, d] of the features [b, h, s, w] of each head with a matrix that the h / j
    heads of a group share, [j, w, d], and the group's offset [j, 1, d].

    As one product a group: `matmul` would copy the matrices for every sequence.
    """
    batch, heads, length, width = features.shape
    groups, one = len(weight), batch == 1
    if not one:
        features = features.unflatten(1, (groups, -1)).transpose(0, 1)
    together = features.reshape(groups, -1, width)
    if offset is None:
        found = torch.bmm(together, weight)
    else:
        found = torch.baddbmm(offset, together, weight)
    if not one:
        found = found.view(groups, batch, -1, weight.shape[-1]).transpose(0, 1)
    return found.reshape(batch, heads, length, -1)


def on_all_pairs(weight: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """The weight of a `BlockGauge`, [j, d / B, w], as a matrix of all rotary pairs, [j, d, w], that
    is zero outside of the blocks; `widths` are the columns of each of the B blocks."""
    last = len(widths) - 1
    if not last:
        return weight
    blocks = [
        nn.functional.pad(x.unflatten(1, (2, 1, -1)), (0, 0, 0, 0, i, last - i))
        for i, x in enumerate(weight.split(list(widths), -1))
    ]  # [j, 2, B, f / B, w of the block] each
    return torch.cat(blocks, -1).flatten(1, 3)


class PairGauge(nn.Module):
    """One complex number for each head and component, commuting with RoPE: weight [j, 2, P]."""

    def __init__(self, heads: int, pairs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, 2, pairs))
        self.kept = Kept()

    def forward(self, rotary_pair: torch.Tensor, pairs: int) -> torch.Tensor:
        """The gauge as a real matrix for each head, [j, 2 f, 2 P]: from components to heads of `f`
        rotary pairs, where component p is on the pair `rotary_pair` [P]."""
        return self.kept.of((self.weight, rotary_pair), lambda: self._matrix(rotary_pair, pairs))

    def _matrix(self, rotary_pair: torch.Tensor, pairs: int) -> torch.Tensor:
        pair = torch.arange(pairs, device=rotary_pair.device)[:, None]
        spread = (pair == rotary_pair).to(self.weight.dtype)
        real, imaginary = (x[:, None] * spread for x in self.weight.unbind(-2))
        halves = (torch.cat(h, -1) for h in ((real, -imaginary), (imaginary, real)))
        return torch.cat(tuple(halves), 1)


class HeadGauge(nn.Module):
    """A real matrix for each head, weight [j, d, width], and perhaps an offset [j, d].

    Args:
        widths: of runs of features, each with zeros behind it up to whole words.
    """

    def __init__(self, heads: int, head_dim: int, widths: list[int], offset: bool = False):
        super().__init__()
        self.widths = widths
        self.weight = nn.Parameter(torch.zeros(heads, head_dim, sum(widths)))
        self.offset = nn.Parameter(torch.zeros(heads, head_dim)) if offset else None
        self.kept = Kept()

    def forward(
        self,
        features: torch.Tensor,
        heads: Heads = None,
        before: torch.Tensor | None = None,
        blocks: Sequence[int] = (),
    ) -> torch.Tensor:
        """Heads [b, j, s, d] of features [b, 1, s, width], or [b, h, s, d] of those of each of the
        h heads that share the j matrices.

        Args:
            features: in whole words; a single run may come without zeros behind it.
            heads: those of the features and of the result.
            before: the weight of a `BlockGauge` [j, d / B, w], whose features come first in the
                run, and how many are of each of its blocks.
        """
        weight = of_heads(self.matrix(before, blocks), heads)
        offset = of_heads(self.offset, heads)
        features = as_wide_as(features, weight)
        if features.shape[1] == 1:
            return heads_of(features, weight, offset)
        return each_head(features, weight.mT, None if offset is None else offset[:, None])

    def matrix(
        self, before: torch.Tensor | None = None, blocks: Sequence[int] = ()
    ) -> torch.Tensor:
        """The weight for features in whole words, [j, d, w]; see `forward`."""
        made_of = (self.weight,) if before is None else (before, self.weight)
        return self.kept.of(made_of, lambda: self._matrix(before, blocks))

    def _matrix(self, before: torch.Tensor | None, blocks: Sequence[int]) -> torch.Tensor:
        if before is None:
            return in_whole_words(self.weight, self.widths)
        matrix = torch.cat((on_all_pairs(before, blocks), self.weight), -1)
        return in_whole_words(matrix, [matrix.shape[-1]])


class BlockGauge(nn.Module):
    """As `HeadGauge`, with features that make heads on blocks of rotary pairs: weight [j, d / B,
    width].

    Features that belong to no block come last and have a gauge of their own, `shared`. All of them
    are one run.

    Args:
        widths: features of each of the B blocks.
        shared: features of none.
    """

    at_once = 1024  # features that a GPU multiplies in one launch, with zeros between blocks

    def __init__(self, heads: int, head_dim: int, widths: list[int], shared: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_dim // len(widths), sum(widths)))
        self.widths = widths
        self.shared = HeadGauge(heads, head_dim, [shared], offset=True)

    def forward(self, features: torch.Tensor, heads: Heads = None) -> torch.Tensor:
        """Heads [b, j, s, d] of features [b, 1, s, all widths], in whole words."""
        width = sum(self.widths)
        if self.together():
            return self.shared(features, heads, self.weight, self.widths)
        blocks, rest = features[..., :width].split(self.widths, -1), features[..., width:]
        weights = of_heads(self.weight, heads).split(self.widths, -1)
        parts = [heads_of(x, weight) for x, weight in zip(blocks, weights, strict=True)]
        halves = torch.stack(parts, dim=-2).unflatten(-1, (2, -1))  # [b, j, s, B, 2, f / B]
        return halves.transpose(-3, -2).flatten(-3) + self.shared(rest, heads)

    def together(self) -> bool:
        """Whether a single product makes all blocks."""
        blocks, width = len(self.widths), sum(self.widths)
        return blocks == 1 or (self.weight.is_cuda and width <= self.at_once)

    def whole(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The matrices of all blocks for features in whole words, [j, d, w], and offsets [j, d];
        None where there are none."""
        if not self.together():
            return None
        return self.shared.matrix(self.weight, self.widths), self.shared.offset
