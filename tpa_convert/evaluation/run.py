"""Everything at once: source and converted models through all measurements, into one report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import LongTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.evaluation.metrics.cache import cache_bytes
from tpa_convert.evaluation.metrics.harness import run_tasks
from tpa_convert.evaluation.metrics.multiple_choice import (
    Accuracy,
    load_questions,
    multiple_choice,
    paired_drop,
    task_name,
)
from tpa_convert.evaluation.metrics.speed import SpeedSettings, fitting_prompt, measure_speed
from tpa_convert.evaluation.report import EvaluationReport, Row
from tpa_convert.evaluation.texts import blocks_by_source
from tpa_convert.forward.comparison import compare, geometric_mean
from tpa_convert.progress import Track, no_tracking
from tpa_convert.text.read import Text, distinct_names
from tpa_convert.text.tokens import Documents

PROMPT_TOKENS = 24  # of the evaluation text, where no prompt is given
DEFAULT_PROMPT = "Once upon a time"
CHOICES = "Multiple choice (% right)"
TASKS = "lm-evaluation-harness"


def evaluate(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Documents | Sequence[Text] | None = None,
    choices: Sequence[str | Path] = (),
    tasks: Sequence[str] = (),
    speed: bool | SpeedSettings = True,
    prompt: str | None = None,
    block_length: int = 1024,
    max_blocks: int = 64,
    limit: int | None = None,
    batch_size: int = 8,
    sample_tokens: int = 48,
    include_path: str | Path | None = None,
    track: Track = no_tracking,
) -> EvaluationReport:
    """Measure models side by side.

    Args:
        models: by column name; the first is the source, to which the others are compared.
        texts: for perplexity and agreement (see `load_texts`), a row per source (see
            `blocks_by_source`).
        choices: multiple-choice files (see `load_questions`).
        tasks: tasks of lm-evaluation-harness by name.
        speed: False leaves the speed out.
        prompt: continued greedily by each model. None: the first words of the text; "": no samples.
        block_length: tokens in a sequence of the text, at most the models' context.
        max_blocks: sequences per text source.
        limit: questions per file and task.
        batch_size: sequences per forward pass.
        sample_tokens: new tokens of a sample.
        include_path: directory of task files of one's own for the harness.
        track: shows progress, called as `track(items, description)`.

    Raises:
        UserError: unusable texts, questions or tasks.
    """
    contexts = [getattr(m.config, "max_position_embeddings", None) for m in models.values()]
    block_length = min([block_length, *(context for context in contexts if context)])
    # What can be wrong with the input is found before anything slow starts: first the files, then
    # the names of tasks and a missing network.
    questions = {name: load_questions(path, limit) for name, path in _task_names(choices).items()}
    blocks: dict[str, LongTensor] = {}
    if texts is not None:
        blocks = blocks_by_source(tokenizer, texts, block_length, max_blocks)
    task_rows = (
        _task_rows(models, tokenizer, tasks, limit, batch_size, include_path) if tasks else []
    )

    rows: list[Row] = []
    notes: list[str] = []
    if blocks:
        rows += _text_rows(models, blocks, batch_size, track)
        tokens = sum(part.numel() for part in blocks.values())
        notes.append(
            f"text: {tokens:,} tokens in sequences of {block_length}, also for the agreement"
        )
    if questions:
        choice_rows, errors = _choice_rows(models, tokenizer, questions, batch_size, track)
        rows += choice_rows
        count = sum(map(len, questions.values()))
        notes.append(
            f"multiple choice: {count:,} questions, zero-shot, log-likelihood per byte, standard "
            f"error {min(errors):.1f} to {max(errors):.1f}"
        )
        if len(models) > 1:
            notes.append("drop: mean over tasks ± 95 % interval, compared question by question")
    rows += task_rows
    rows += _cache_rows(models)
    timed = SpeedSettings() if speed is True else speed
    if timed:
        rows += _speed_rows(models, timed, track)
        notes.append(
            f"speed: {_hardware(models)}, batch {timed.batch}, prompt of "
            f"{fitting_prompt(models, timed)} tokens, {timed.new_tokens} new ones"
        )
    if prompt is None:
        prompt = _first_words(tokenizer, blocks) if blocks else DEFAULT_PROMPT
    samples = {}
    if prompt:
        samples = {n: _sample(m, tokenizer, prompt, sample_tokens) for n, m in models.items()}
    settings = {
        "block_length": block_length,
        "max_blocks": max_blocks,
        "limit": limit,
        "hardware": _hardware(models),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "notes": notes,
    }
    return EvaluationReport(tuple(models), tuple(rows), prompt or None, samples, settings)


def _task_names(paths: Sequence[str | Path]) -> dict[str, str | Path]:
    """Short names of files; whole paths where the short names are the same."""
    names = distinct_names([task_name(path) for path in paths], list(map(str, paths)))
    return dict(zip(names, paths, strict=True))


def _text_rows(
    models: Mapping[str, PreTrainedModel],
    blocks: Mapping[str, LongTensor],
    batch_size: int,
    track: Track,
) -> list[Row]:
    source = next(iter(models))
    rows, kl, top1 = [], dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    for name, part in blocks.items():
        texts, agreements = compare(
            models, part, batch_size=batch_size, track=track, description=f"Perplexity of {name}"
        )
        values: dict[str, float | None] = {m: p.perplexity for m, p in texts.items()}
        rows.append(Row("Perplexity", name, "perplexity", values, False, recovers=True))
        for model, agreement in agreements.items():
            kl[model] += agreement.kl / len(blocks)
            top1[model] += 100 * agreement.top1 / len(blocks)
    if len(rows) > 1:
        means: dict[str, float | None] = {
            m: geometric_mean(row.values[m] or 0.0 for row in rows) for m in models
        }
        rows.append(Row("Perplexity", "geometric mean", "perplexity", means, False, recovers=True))
    if len(models) > 1:
        for label, unit, scores, higher in (
            ("KL divergence (nats per token)", "nats", kl, False),
            ("same likeliest token (%)", "percent", top1, True),
        ):
            shown = {m: None if m == source else v for m, v in scores.items()}
            rows.append(Row("Agreement with the source", label, unit, shown, higher))  # type: ignore[arg-type]
    return rows


def _choice_rows(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, Sequence],
    batch_size: int,
    track: Track,
) -> tuple[list[Row], list[float]]:
    """Rows of accuracies in percent, and the standard errors in points."""
    rows, errors = [], []
    found: dict[str, list[Accuracy]] = {name: [] for name in models}
    for task, asked in questions.items():
        for name, model in models.items():
            accuracy = multiple_choice(
                model,
                tokenizer,
                asked,
                batch_size=batch_size,
                track=track,
                description=f"{task}, {name}",
            )
            found[name].append(accuracy)
            errors.append(100 * accuracy.standard_error)
        values: dict[str, float | None] = {n: 100 * a[-1].normalized for n, a in found.items()}
        rows.append(Row(CHOICES, task, "percent", values, True, recovers=True))
    if len(rows) > 1:
        means: dict[str, float | None] = {
            m: sum(row.values[m] or 0.0 for row in rows) / len(rows) for m in models
        }
        rows.append(Row(CHOICES, "mean", "percent", means, True, recovers=True))
    source, *others = models
    if others:
        drops = {name: paired_drop(found[source], found[name]) for name in others}
        points: dict[str, float | None] = {source: None}
        points |= {name: drop.points for name, drop in drops.items()}
        margins = {name: drop.margin for name, drop in drops.items()}
        rows.append(Row(CHOICES, "drop (points)", "points", points, False, margins=margins))
    return rows, errors


def _task_rows(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int,
    include_path: str | Path | None,
) -> list[Row]:
    results = run_tasks(
        models, tokenizer, tasks, limit=limit, batch_size=batch_size, include_path=include_path
    )
    rows = []
    for task, first in next(iter(results.values())).items():
        metric = first.headline
        if metric is None:
            continue
        higher = first.higher_is_better.get(metric, True)
        share = higher and all(
            0 <= result[task].metrics[metric] <= 1 for result in results.values()
        )
        values: dict[str, float | None] = {
            name: result[task].metrics[metric] * (100 if share else 1)
            for name, result in results.items()
        }
        unit, sign = ("percent", " (%)") if share else ("score", "")
        rows.append(Row(TASKS, f"{task}, {metric}{sign}", unit, values, higher, recovers=True))  # type: ignore[arg-type]
    return rows


def _cache_rows(models: Mapping[str, PreTrainedModel]) -> list[Row]:
    caches = {name: cache_bytes(model) for name, model in models.items()}
    dtypes = sorted({cache.dtype for cache in caches.values()})
    per_token: dict[str, float | None] = {n: c.per_token for n, c in caches.items()}
    numbers: dict[str, float | None] = {n: c.numbers / len(c.per_layer) for n, c in caches.items()}
    section = "Key-value cache, measured"
    return [
        Row(section, f"bytes per token ({', '.join(dtypes)})", "bytes", per_token, False),
        Row(section, "numbers per token and layer", "numbers", numbers, False),
    ]


def _speed_rows(
    models: Mapping[str, PreTrainedModel], settings: SpeedSettings, track: Track
) -> list[Row]:
    speeds = measure_speed(models, settings, track=track)
    prefill: dict[str, float | None] = {name: speed.prefill for name, speed in speeds.items()}
    decode: dict[str, float | None] = {name: speed.decode for name, speed in speeds.items()}
    return [
        Row("Speed, tokens/s", "prefill", "tokens/s", prefill, True),
        Row("Speed, tokens/s", "decode", "tokens/s", decode, True),
    ]


def _hardware(models: Mapping[str, PreTrainedModel]) -> str:
    model = next(iter(models.values()))
    dtype = str(model.dtype).removeprefix("torch.")
    if model.device.type == "cuda":
        return f"{torch.cuda.get_device_name(model.device)}, {dtype}"
    threads = torch.get_num_threads()
    plural = "" if threads == 1 else "s"
    return f"{model.device.type} ({platform.machine()}, {threads} thread{plural}), {dtype}"


def _first_words(tokenizer: PreTrainedTokenizerBase, blocks: Mapping[str, LongTensor]) -> str:
    text = tokenizer.decode(next(iter(blocks.values()))[0, :PROMPT_TOKENS].tolist()).strip()
    whole_words = text.rsplit(maxsplit=1)[:-1]  # the last one may be cut
    return whole_words[0] if whole_words else text


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int
) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
    new = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)
