"""Tables beyond perplexity: by position in a long text, zero-shot tasks, last words of sentences,
needles, chat."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.last_words import last_word_accuracy, last_words
from common.machine import tf32
from tpa_convert.evaluation import (
    Accuracy,
    Question,
    blocks_by_source,
    compare,
    load_questions,
    multiple_choice,
    paired_drop,
)
from tpa_convert.evaluation.metrics.multiple_choice import task_name
from tpa_convert.forward.logits import chunk_positions, split_head
from tpa_convert.text.read import load_documents

EDGES = (0, 32, 256, 512, 1024, 2048, 4096, 8192)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
CHOICES = 10  # numbers to choose from
SLACK = 16  # tokens of a needle's text that are left free
THINGS = ("bridge", "castle", "garden", "harbour", "library", "lighthouse", "mill", "station")
Asked = TypeVar("Asked")
CHAT_PROMPTS = Path(__file__).with_name("chat_prompts.txt")


@torch.inference_mode()
def scores_by_position(model: PreTrainedModel, source: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Negative log-likelihood of each token of blocks [N, L] but the first, and the KL from the
    source's prediction of it, mean over blocks: [2, L - 1]."""
    body, head = split_head(model.eval())
    source_body, source_head = split_head(source.eval())
    step = chunk_positions(model)
    total = torch.zeros(2, blocks.shape[1] - 1, dtype=torch.float64, device=model.device)
    for block in blocks.to(model.device):
        features = body(block[None])[0, :-1].split(step)
        source_features = source_body(block[None])[0, :-1].split(step)
        parts = []
        for one, other, targets in zip(
            features, source_features, block[1:].split(step), strict=True
        ):
            logits = head(one).log_softmax(-1)
            loss = nll_loss(logits, targets, reduction="none")
            expected = source_head(other).log_softmax(-1)
            divergence = kl_div(logits, expected, reduction="none", log_target=True).sum(-1)
            parts.append(torch.stack([loss, divergence]))
        total += torch.cat(parts, dim=1)
    return (total / len(blocks)).cpu()


def position_table(models: Mapping[str, PreTrainedModel], blocks: Mapping[str, Tensor]) -> None:
    """Perplexity of each model by position, relative to the first, and KL from it; geometric and
    arithmetic mean over texts."""
    length = max(part.shape[1] for part in blocks.values())
    spans = [(a, b) for a, b in itertools.pairwise(EDGES) if a < length]
    print(f"\n| perplexity at tokens | {' | '.join(f'{a}–{b}' for a, b in spans)} |")
    print("|---" * (len(spans) + 1) + "|")
    source = next(iter(models.values()))
    reference = None
    for name, model in models.items():
        scores = [scores_by_position(model, source, part) for part in blocks.values()]
        loss, divergence = torch.stack(scores).mean(0)
        reference = loss if reference is None else reference
        cells = []
        for a, b in spans:
            span = slice(max(a - 1, 0), b - 1)
            value, expected, kl = (x[span].mean().item() for x in (loss, reference, divergence))
            beside = f" (×{math.exp(value - expected):.3f}, KL {kl:.3f})"
            cells.append(f"{math.exp(value):.2f}" + (beside if model is not source else ""))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


@tf32()
def task_table(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[str],
    limit: int | None = None,
) -> None:
    """Length-normalised zero-shot accuracy in percent, the mean over tasks, and its paired drop."""
    tasks = {task_name(file): load_questions(file, limit) for file in sorted(files)}
    sizes = [f"{name} ({len(questions)})" for name, questions in tasks.items()]
    choice_table("accuracy, %", models, tokenizer, dict(zip(sizes, tasks.values(), strict=True)))
    question_table(models, tokenizer, tasks)


def question_text(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> tuple[Tensor, Tensor]:
    """Questions with their right choices as rows of tokens [N, L], padded on the right, and which
    of these are text, bool [N, L]."""
    texts = [f"{q.query} {q.choices[q.gold]}" for q in questions]
    rows = [torch.tensor(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    ids = pad_sequence(rows, batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def question_table(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Question]],
    batch_size: int = 64,
) -> None:
    """KL from the first model on the text of questions with their right choices: with far less
    noise than accuracy, how near a model stays to its source on tasks."""
    found: dict[str, list[float]] = {name: [] for name in list(models)[1:]}
    for questions in tasks.values():
        ids, counted = question_text(tokenizer, questions)
        _, agreements = compare(models, ids, counted=counted, batch_size=batch_size)
        for name, agreement in agreements.items():
            found[name].append(agreement.kl)
    print(f"\n| KL on questions | {' | '.join(tasks)} | mean |")
    print("|---" * (len(tasks) + 2) + "|")
    for name, values in found.items():
        cells = " | ".join(f"{value:.4f}" for value in values)
        print(f"| {name} | {cells} | {fmean(values):.4f} |", flush=True)


def choice_table(
    title: str,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, Sequence[Question]],
    batch_size: int = 64,
) -> None:
    """`accuracy_table` of questions, a column each."""

    def accuracy(model: PreTrainedModel, questions: Sequence[Question]) -> Accuracy:
        return multiple_choice(model, tokenizer, questions, batch_size=batch_size)

    accuracy_table(title, models, columns, accuracy)


def accuracy_table(
    title: str,
    models: Mapping[str, PreTrainedModel],
    columns: Mapping[str, Asked],
    accuracy: Callable[[PreTrainedModel, Asked], Accuracy],
) -> None:
    """Accuracy in percent on what each column asks; their mean; points lost to the first model,
    with the paired 95 % interval."""
    print(f"\n| {title} | {' | '.join(columns)} | mean | drop |")
    print("|---" * (len(columns) + 3) + "|")
    reference: list[Accuracy] = []
    for name, model in models.items():
        found = [accuracy(model, asked) for asked in columns.values()]
        reference = reference or found
        values = [100 * accuracy.normalized for accuracy in found]
        drop = paired_drop(reference, found)
        lost = "" if found is reference else f"{drop.points:.2f} ± {drop.margin:.2f}"
        cells = " | ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {cells} | {fmean(values):.2f} | {lost} |", flush=True)


def needle_questions(
    tokenizer: PreTrainedTokenizerBase, filler: str, length: int, per_depth: int, seed: int
) -> list[Question]:
    """Long texts that hide a sentence with a number, and the number to choose at their end.

    Args:
        filler: what the sentence is hidden in, from random places; repeated if it is too short.
        length: tokens of a text with the question and its answer, about and at most.
        per_depth: questions for each of DEPTHS, 0 at the beginning of the text and 1 at its end.
    """
    random = Random(seed)
    ids = tokenizer(filler, add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids * (length // len(ids) + 2)
    questions = []
    for depth in DEPTHS * per_depth:
        thing = random.choice(THINGS)
        numbers = [str(number) for number in random.sample(range(1000, 10_000), CHOICES)]
        gold = random.randrange(CHOICES)
        needle = f"\n\nThe secret number of the old {thing} is {numbers[gold]}.\n\n"
        question = f"\n\nThe secret number of the old {thing} is"
        rest = tokenizer(needle + question + " " + numbers[gold])["input_ids"]
        # Cut and joined, text may take a few tokens more than it did.
        room = max(0, length - len(rest) - SLACK)
        start = random.randrange(len(ids) - room)
        cut = start + round(depth * room)
        before, after = tokenizer.decode(ids[start:cut]), tokenizer.decode(ids[cut : start + room])
        questions.append(Question(before + needle + after + question, tuple(numbers), gold))
    return questions


def long_texts() -> torch.autocast:
    """Runs models on a GPU in bf16: flash attention has no fp32, and without it each long text
    costs gigabytes of scores."""
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())


def needle_table(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    filler: str,
    lengths: Sequence[int] = (1024, 2048, 4096, 8192),
    *,
    per_depth: int = 2,
    seed: int = 0,
) -> None:
    """How often the number that a long text once names is the likeliest of ten at its end, in
    percent (chance: 10)."""
    columns = {
        f"{length} tokens": needle_questions(tokenizer, filler, length, per_depth, seed)
        for length in lengths
    }
    title = f"needles found, % of {len(DEPTHS) * per_depth}"
    with long_texts():
        choice_table(title, models, tokenizer, columns, batch_size=16)


def last_word_table(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    count: int = 500,
) -> None:
    """How often the last word of a sentence is said right, in percent, by kind of text."""
    words = {name: last_words(tokenizer, part, count) for name, part in texts.items()}
    columns = {f"{name} ({len(part)})": part for name, part in words.items() if part}
    accuracy_table("last words, %", models, columns, last_word_accuracy)


def source_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
) -> tuple[Tensor, Tensor]:
    """Greedy answers in the tokenizer's chat format.

    Returns: conversations, padded on the right, int64 [N, L]; which of their tokens belong to the
        answer, its end-of-text token included, bool [N, L].
    """
    eos = model.generation_config.eos_token_id or tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=tokenizer.eos_token_id,
    )
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in prompts
    ]
    longest = max(map(len, asked))
    inputs, mask = (torch.zeros(len(asked), longest, dtype=torch.long) for _ in "im")
    for i, tokens in enumerate(asked):  # padded on the left, where nothing attends to it
        inputs[i, longest - len(tokens) :] = torch.tensor(tokens)
        mask[i, longest - len(tokens) :] = 1
    output = model.generate(
        inputs.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
    ).cpu()
    ends_turn = torch.isin(output[:, longest:], torch.tensor(eos))
    rows = []
    for row, tokens, ends in zip(output, asked, ends_turn, strict=True):
        length = int(ends.int().argmax()) + 1 if ends.any() else len(ends)
        rows.append(row[longest - len(tokens) : longest + length])
    starts = [len(tokens) for tokens in asked]
    ids = pad_sequence(rows, batch_first=True)
    position = torch.arange(ids.shape[1])
    ends = torch.tensor([len(row) for row in rows])[:, None]
    return ids, (position >= torch.tensor(starts)[:, None]) & (position < ends)


def chat_table(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | None = None,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> None:
    """Agreement with the first model on its own greedy answers, over the answers' tokens only.

    Args:
        prompts: what a user says; by default the lines of chat_prompts.txt.
    """
    source = next(iter(models))
    prompts = prompts or CHAT_PROMPTS.read_text(encoding="utf-8").splitlines()
    ids, answers = source_answers(models[source], tokenizer, prompts, max_new_tokens)
    texts, agreements = compare(models, ids, counted=answers, batch_size=batch_size)
    tokens = texts[source].tokens
    print(f"\n| chat, {len(ids)} answers, {tokens} tokens | KL | top-1 % | perplexity | ratio |")
    print("|---" * 5 + "|")
    for name, text in texts.items():
        found = agreements.get(name)
        cells = f"{found.kl:.4f} | {100 * found.top1:.1f}" if found else " | "
        ratio = f"×{text.perplexity / texts[source].perplexity:.3f}" if found else ""
        print(f"| {name} | {cells} | {text.perplexity:.3f} | {ratio} |", flush=True)


@tf32()
def quality_tables(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    valid: str,
    lengths: Sequence[int] = (1024, 2048, 4096, 8192),
    answer_tokens: int = 128,
) -> None:
    """Positions and needles in the held-out text of a file, and chat if the tokenizer knows it."""
    blocks = blocks_by_source(tokenizer, load_documents(valid), max(lengths), 8)
    position_table(models, blocks)
    texts = {name: [tokenizer.decode(row) for row in part] for name, part in blocks.items()}
    last_word_table(models, tokenizer, texts)
    filler = tokenizer.decode(torch.cat([part.flatten() for part in blocks.values()]))
    needle_table(models, tokenizer, filler, lengths)
    if tokenizer.chat_template:
        chat_table(models, tokenizer, max_new_tokens=answer_tokens)
    else:
        print("\nNo chat: the source's tokenizer has no chat template.")
