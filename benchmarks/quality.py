"""Tables beyond perplexity: by position in a long text, and zero-shot multiple choice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.evaluation.logits import chunk_positions, split_head
from tpa_convert.evaluation.multiple_choice import load_questions, multiple_choice, task_name

EDGES = (0, 256, 512, 1024, 2048, 4096, 8192)


@torch.inference_mode()
def loss_by_position(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Negative log-likelihood of each token but the first, mean over blocks [N, L]: [L - 1]."""
    body, head = split_head(model.eval())
    step = chunk_positions(model)
    total = torch.zeros(blocks.shape[1] - 1, dtype=torch.float64, device=model.device)
    for block in blocks.to(model.device):
        features = body(block[None])[0, :-1].split(step)
        targets = block[1:].split(step)
        parts = [
            cross_entropy(head(feature), target, reduction="none")
            for feature, target in zip(features, targets, strict=True)
        ]
        total += torch.cat(parts)
    return (total / len(blocks)).cpu()


def position_table(models: Mapping[str, PreTrainedModel], blocks: Mapping[str, Tensor]) -> None:
    """Perplexity of each model by position, relative to the first; geometric mean over texts."""
    spans = list(itertools.pairwise(EDGES))
    print(f"\n| perplexity at tokens | {' | '.join(f'{a}–{b}' for a, b in spans)} |")
    print("|---" * (len(spans) + 1) + "|")
    reference = None
    for name, model in models.items():
        loss = torch.stack([loss_by_position(model, part) for part in blocks.values()]).mean(0)
        reference = loss if reference is None else reference
        cells = []
        for a, b in spans:
            value, source = (x[max(a - 1, 0) : b - 1].mean().item() for x in (loss, reference))
            ratio = "" if loss is reference else f" (×{math.exp(value - source):.3f})"
            cells.append(f"{math.exp(value):.2f}{ratio}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def task_table(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[str],
    limit: int | None = None,
) -> None:
    """Length-normalised zero-shot accuracy in percent, and the mean over tasks."""
    tasks = {task_name(file): load_questions(file, limit) for file in sorted(files)}
    sizes = " | ".join(f"{name} ({len(questions)})" for name, questions in tasks.items())
    print(f"\n| accuracy, % | {sizes} | mean | drop |")
    print("|---" * (len(tasks) + 3) + "|")
    reference = None
    for name, model in models.items():
        values = [
            100 * multiple_choice(model, tokenizer, questions, batch_size=64).normalized
            for questions in tasks.values()
        ]
        mean = sum(values) / len(values)
        reference = mean if reference is None else reference
        cells = " | ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {cells} | {mean:.2f} | {reference - mean:+.2f} |", flush=True)
