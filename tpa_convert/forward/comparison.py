"""Perplexity, and how closely a converted model agrees with its source, in one pass over a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.errors import UserError
from tpa_convert.forward.ids import check_ids
from tpa_convert.forward.logits import chunk_positions, split_head
from tpa_convert.progress import Track, no_tracking


@dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihood of a text.

    Attributes:
        nll_per_token: nats, mean over the predicted tokens.
        tokens: number of predicted tokens (all but the first of each block).
    """

    nll_per_token: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll_per_token) if self.nll_per_token < 700 else math.inf


@dataclass(frozen=True)
class Agreement:
    """How a model's next-token distributions agree with those of its source.

    Attributes:
        kl: KL(source || model), nats, mean over tokens.
        top1: share of tokens at which both hold the same token for the likeliest, 0 to 1.
        tokens: number of predicted tokens.
    """

    kl: float
    top1: float
    tokens: int


@dataclass(frozen=True)
class BlockScores:
    """Sums over the predicted tokens of each block of a text, float64 [N] each, on the CPU.

    Attributes:
        nll: negative log-likelihood, nats.
        kl: KL(source || model), nats; zero for the source.
        same: tokens at which source and model hold the same token for the likeliest.
        tokens: predicted tokens, int64.
    """

    nll: Tensor
    kl: Tensor
    same: Tensor
    tokens: Tensor

    @property
    def perplexity(self) -> Perplexity:
        """Over all blocks."""
        count = int(self.tokens.sum())
        return Perplexity(self.nll.sum().item() / count, count)

    @property
    def agreement(self) -> Agreement:
        """Over all blocks."""
        count = int(self.tokens.sum())
        return Agreement(self.kl.sum().item() / count, self.same.sum().item() / count, count)


def perplexity(model: PreTrainedModel, blocks: Tensor, batch_size: int = 8) -> Perplexity:
    """Perplexity of `model` on token blocks.

    Args:
        blocks: token ids [N, L], L >= 2; each block is predicted on its own, without its first
            token. Log-probabilities are computed in fp32 whatever the model's dtype.
        batch_size: blocks per forward pass.
    """
    return compare({"model": model}, blocks, batch_size=batch_size)[0]["model"]


def agreement(
    source: PreTrainedModel, model: PreTrainedModel, blocks: Tensor, batch_size: int = 8
) -> Agreement:
    """Agreement of `model` with `source` on token blocks [N, L]."""
    models = {"source": source, "model": model}
    return compare(models, blocks, batch_size=batch_size)[1]["model"]


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm; for perplexities this weighs all texts alike."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))


class Tally:
    """Sums over predicted tokens, of a source and of what is compared with it.

    Args:
        names: the first is the source's.
        blocks: how many blocks of text sums are kept of, each by itself.
    """

    def __init__(self, names: Iterable[str], device: torch.device, blocks: int = 1):
        self.sums = {  # nats, nats, and tokens with the same likeliest token
            name: torch.zeros(3, blocks, dtype=torch.float64, device=device) for name in names
        }
        self.tokens = torch.zeros(blocks, dtype=torch.int64, device=device)

    def add(self, logits: Iterable[Tensor], target: Tensor, block: Tensor | None = None) -> None:
        """Adds some tokens.

        Args:
            logits: of every model in turn, fp32 [n, V]; one is asked for at a time.
            target: the tokens that came, [n].
            block: the number of the block that each of them is of, [n]; by default the first.
        """
        block = torch.zeros_like(target) if block is None else block
        self.tokens.index_add_(0, block, torch.ones_like(block))
        reference = None
        for (nll, kl, same), rows in zip(self.sums.values(), logits, strict=True):
            log_p = F.log_softmax(rows.to(target.device), dim=-1)
            nll.index_add_(0, block, F.nll_loss(log_p, target, reduction="none").double())
            if reference is None:
                reference = log_p
                top, weights = log_p.argmax(-1), log_p.exp()
                same.index_add_(0, block, torch.ones_like(block, dtype=torch.float64))
            else:
                parts = (weights * (reference - log_p)).sum(-1, dtype=torch.float64)
                kl.index_add_(0, block, parts)
                same.index_add_(0, block, (log_p.argmax(-1) == top).double())

    def scores(self) -> dict[str, BlockScores]:
        """Of every name."""
        tokens = self.tokens.cpu()
        found = {name: sums.cpu().unbind() for name, sums in self.sums.items()}
        return {name: BlockScores(nll, kl, same, tokens) for name, (nll, kl, same) in found.items()}

    def results(self) -> tuple[dict[str, Perplexity], dict[str, Agreement]]:
        """Perplexity of all, and the agreement of all but the source with it."""
        found = self.scores()
        texts = {name: scores.perplexity for name, scores in found.items()}
        _, *others = found
        return texts, {name: found[name].agreement for name in others}


def compare(
    models: Mapping[str, PreTrainedModel],
    blocks: Tensor,
    *,
    counted: Tensor | None = None,
    batch_size: int = 8,
    track: Track = no_tracking,
    description: str = "Perplexity",
) -> tuple[dict[str, Perplexity], dict[str, Agreement]]:
    """Perplexity of all models, and the agreement of all but the first with the first.

    Takes and raises what `block_scores` does.
    """
    found = block_scores(
        models,
        blocks,
        counted=counted,
        batch_size=batch_size,
        track=track,
        description=description,
    )
    texts = {name: scores.perplexity for name, scores in found.items()}
    _, *others = found
    return texts, {name: found[name].agreement for name in others}


@torch.inference_mode()
def block_scores(
    models: Mapping[str, PreTrainedModel],
    blocks: Tensor,
    *,
    counted: Tensor | None = None,
    batch_size: int = 8,
    track: Track = no_tracking,
    description: str = "Perplexity",
) -> dict[str, BlockScores]:
    """What every model makes of each block, and how it agrees with the first model there.

    Args:
        models: by name; the first is the source.
        blocks: token ids [N, L], L >= 2; shorter texts are padded on the right.
        counted: bool [N, L], the tokens whose predictions count; by default all. The first of a
            block is never predicted.
        track: shows progress, called as `track(batches, description)`.

    Raises:
        UserError: blocks of a single token, models with different vocabularies, or ids that one
            of them does not know.
    """
    if blocks.ndim != 2 or blocks.shape[1] < 2 or len(blocks) == 0:
        raise UserError(f"perplexity needs blocks of at least 2 tokens, not {list(blocks.shape)}")
    sizes = {m.config.get_text_config().vocab_size for m in models.values()}
    if len(sizes) > 1:
        raise UserError(f"the models have different vocabularies: {sorted(sizes)} tokens")
    for model in models.values():
        check_ids(model, blocks)
    halves = {name: split_head(model.eval()) for name, model in models.items()}
    source = next(iter(models.values()))
    step = chunk_positions(source)
    tally = Tally(models, source.device, len(blocks))
    counted = torch.ones_like(blocks, dtype=torch.bool) if counted is None else counted
    counted = counted[:, 1:]
    numbers = torch.arange(len(blocks))[:, None].expand_as(counted)
    batches = zip(*(part.split(batch_size) for part in (blocks, counted, numbers)), strict=True)
    for batch, wanted, rows in track(list(batches), description):
        targets = batch[:, 1:][wanted].to(source.device)
        of_block = rows[wanted].to(source.device)
        features = {}
        for name, (body, _) in halves.items():
            states = body(batch.to(models[name].device))
            features[name] = states[:, :-1][wanted.to(states.device)].split(step)
        chunks = zip(targets.split(step), of_block.split(step), strict=True)
        for i, (target, block) in enumerate(chunks):
            logits = (head(features[name][i]) for name, (_, head) in halves.items())
            tally.add(logits, target, block)
    return tally.scores()
