"""How much more one model loses than another on the same text, with an interval.

Blocks of a text are the sample. Two models see the same blocks, so that what differs between blocks
falls out of the difference, and its interval is much narrower than that of either loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist, fmean
from typing import Literal, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from common.machine import tf32
from tpa_convert.forward.comparison import BlockScores, block_scores

NORMAL_95 = NormalDist().inv_cdf(0.975)

Scores = Mapping[str, BlockScores]
"""Of one model, by text."""


class HeldOut(NamedTuple):
    """A held-out text.

    Attributes:
        ids: blocks of tokens [N, L], padded on the right.
        counted: bool [N, L], which of them are text; None for all.
    """

    ids: Tensor
    counted: Tensor | None = None


class Difference(NamedTuple):
    """Of two losses, nats a token.

    Attributes:
        mean: how much more the other model loses, mean over texts.
        margin: half of the 95 % confidence interval; infinite if a text is a single block.
    """

    mean: float
    margin: float

    @property
    def verdict(self) -> Literal["first", "tied", "behind"]:
        """Where the model stands that the other one is compared with."""
        if abs(self.mean) <= self.margin:
            return "tied"
        return "first" if self.mean > 0 else "behind"

    def __str__(self) -> str:
        return f"{self.mean:.2g} ± {self.margin:.1g}, {self.verdict}"


@tf32()
def scores(
    model: PreTrainedModel, source: PreTrainedModel, texts: Mapping[str, HeldOut]
) -> dict[str, BlockScores]:
    """What a model makes of texts, and how it agrees with its source there."""
    models = {"source": source, "model": model} if model is not source else {"model": model}
    return {
        name: block_scores(models, text.ids, counted=text.counted)["model"]
        for name, text in texts.items()
    }


def ratio(model: Scores, source: Scores) -> float:
    """Perplexity relative to the source's, geometric mean over texts."""
    logs = [
        model[name].perplexity.nll_per_token - source[name].perplexity.nll_per_token
        for name in model
    ]
    return math.exp(fmean(logs))


def difference(ours: Scores, others: Scores, loss: Literal["nll", "kl"]) -> Difference:
    """How much more another model loses than ours, all texts weighed alike.

    A text's mean is one over tokens, and blocks may have different numbers of them: its variance is
    that of a ratio estimator, n / (n - 1) Σ (d_b - m t_b)² / (Σ t_b)² for the differences d_b of
    blocks with t_b tokens and their mean m.
    """
    means, variance = [], 0.0
    for name, mine in ours.items():
        differences = getattr(others[name], loss) - getattr(mine, loss)
        tokens, n = mine.tokens.double(), len(differences)
        mean = (differences.sum() / tokens.sum()).item()
        squares = (differences - mean * tokens).square().sum() / tokens.sum().square()
        variance += squares.item() * n / (n - 1) if n > 1 else math.inf
        means.append(mean)
    return Difference(fmean(means), NORMAL_95 * math.sqrt(variance) / len(means))
