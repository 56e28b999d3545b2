"""Zero-shot multiple choice by log-likelihood, from local files of {query, choices, gold} lines."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist, fmean, pvariance

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.errors import UserError
from tpa_convert.forward.ids import check_ids
from tpa_convert.forward.logits import chunk_positions, split_head
from tpa_convert.progress import Track, no_tracking
from tpa_convert.text.files import read_files

NORMAL_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Question:
    """A query, the texts to choose from, and the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Accuracy:
    """Shares of questions, 0 to 1, whose right choice is the likeliest.

    Attributes:
        normalized: by log-likelihood per byte of the choice's text (UTF-8).
        plain: by log-likelihood.
        right: for each question, whether its choice by `normalized` is the right one.
    """

    normalized: float
    plain: float
    right: tuple[bool, ...] = field(repr=False)

    @property
    def questions(self) -> int:
        """How many."""
        return len(self.right)

    @property
    def standard_error(self) -> float:
        """Of `normalized`, for a sample of independent questions."""
        return math.sqrt(self.normalized * (1 - self.normalized) / self.questions)


@dataclass(frozen=True)
class Drop:
    """Accuracy lost to the source, in percentage points, mean over tasks.

    Attributes:
        points: negative where the model is better.
        margin: half of the 95 % confidence interval.
    """

    points: float
    margin: float


def paired_drop(source: Sequence[Accuracy], model: Sequence[Accuracy]) -> Drop:
    """How much less accurate (`normalized`) a model is than its source on the same questions.

    Paired: what counts is on which questions the two differ, so the interval is much narrower than
    that of two accuracies. With d = right(source) − right(model) and T tasks of n_t questions, the
    mean of the tasks' mean d has the variance Σ_t var_t(d) / n_t / T²; the interval is normal.

    Args:
        source, model: of the same tasks in the same order, one at least.
    """
    means, variance = [], 0.0
    for before, after in zip(source, model, strict=True):
        differences = [a - b for a, b in zip(before.right, after.right, strict=True)]
        means.append(fmean(differences))
        variance += pvariance(differences) / len(differences) / len(source) ** 2
    return Drop(100 * fmean(means), 100 * NORMAL_95 * math.sqrt(variance))


def load_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """Questions of a jsonl file (also .gz, .xz, .zst), one object {query, choices, gold} a line.

    Args:
        limit: take only the first so many.

    Raises:
        UserError: missing file, or a line that is not a question.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no such file: {path} (multiple-choice questions are jsonl files)")
    table = read_files("json", [str(path)], str(path)).slice(0, limit)
    missing = {"query", "choices", "gold"} - set(table.column_names)
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(sorted(missing))}: lines need query, choices, gold"
        )
    questions = []
    for number, row in enumerate(table.select(["query", "choices", "gold"]).to_pylist(), start=1):
        query, choices, gold = row["query"], row["choices"], row["gold"]
        if (
            not isinstance(query, str)
            or not isinstance(choices, list)
            or not choices
            or not all(isinstance(choice, str) and choice for choice in choices)
            or not isinstance(gold, int)
            or not 0 <= gold < len(choices)
        ):
            raise UserError(
                f"{path}, line {number}: expected a text query, a list of texts as choices, and "
                "as gold the index of the right one"
            )
        questions.append(Question(query, tuple(choices), gold))
    if not questions:
        raise UserError(f"no questions in {path}: the file is empty")
    return questions


def task_name(path: str | Path) -> str:
    """`arc_easy` for `tasks/arc_easy.jsonl.xz`."""
    return re.split(r"\.", Path(path).name)[0] or str(path)


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    track: Track = no_tracking,
    description: str = "Multiple choice",
) -> Accuracy:
    """Accuracy of a model on questions.

    The text scored is the query, a space and a choice, tokenised as a whole; the choice's tokens
    are those after the query's own (as lm-evaluation-harness counts them).

    Args:
        batch_size: texts of 1024 tokens per forward pass; shorter ones go in larger batches.
        track: shows progress, called as `track(batches, description)`.
    """
    texts = [f"{q.query} {choice}" for q in questions for choice in q.choices]
    ids = tokenizer(texts, verbose=False)["input_ids"]
    check_ids(model, max(max(tokens, default=0) for tokens in ids))
    queries = tokenizer([q.query for q in questions], verbose=False)["input_ids"]
    starts = [len(query) for q, query in zip(questions, queries, strict=True) for _ in q.choices]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    pairs = [_fit(tokens, start, limit) for tokens, start in zip(ids, starts, strict=True)]
    scores = iter(_log_likelihoods(model, pairs, batch_size * 1024, track, description))

    plain, right = 0, []
    for question in questions:
        sums = [next(scores) for _ in question.choices]
        means = [s / len(c.encode()) for s, c in zip(sums, question.choices, strict=True)]
        plain += sums.index(max(sums)) == question.gold
        right.append(means.index(max(means)) == question.gold)
    return Accuracy(fmean(right), plain / len(questions), tuple(right))


def _fit(tokens: list[int], start: int, limit: int | None) -> tuple[list[int], int]:
    """Drop the beginning of a text longer than the model's context; predict at least one token."""
    start = max(1, min(start, len(tokens) - 1))
    cut = 0 if limit is None else max(0, len(tokens) - limit)
    return tokens[cut:], max(1, start - cut)


@torch.inference_mode()
def _log_likelihoods(
    model: PreTrainedModel,
    pairs: Sequence[tuple[list[int], int]],
    batch_tokens: int,
    track: Track,
    description: str,
) -> list[float]:
    """Log-likelihood of the tokens from `start` on, for each (tokens, start)."""
    body, head = split_head(model.eval())
    step = chunk_positions(model)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]), reverse=True)
    batches: list[list[int]] = []
    while order:
        size = max(1, batch_tokens // len(pairs[order[0]][0]))
        batches.append(order[:size])
        order = order[size:]
    scores = [0.0] * len(pairs)
    for batch in track(batches, description):
        # Padded on the right: under a causal mask the padding is seen by no real token.
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(pairs[i][0]) for i in batch], batch_first=True
        ).to(model.device)
        features = body(ids)
        # All scored positions of the batch go through the output head together, in chunks.
        counts = [len(pairs[i][0]) - pairs[i][1] for i in batch]
        rows = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts)).to(model.device)
        columns = torch.cat([torch.arange(pairs[i][1], len(pairs[i][0])) for i in batch])
        columns = columns.to(model.device)
        chunks = zip(rows.split(step), columns.split(step), strict=True)
        terms = [
            -cross_entropy(head(features[r, c - 1]), ids[r, c], reduction="none") for r, c in chunks
        ]
        for i, part in zip(batch, torch.cat(terms).double().split(counts), strict=True):
            scores[i] = part.sum().item()
    return scores
