"""The rows of an evaluation report, one function for each kind of measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import LongTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.evaluation.metrics.cache import cache_bytes
from tpa_convert.evaluation.metrics.harness import run_tasks
from tpa_convert.evaluation.metrics.multiple_choice import Accuracy, multiple_choice, paired_drop
from tpa_convert.evaluation.metrics.speed import SpeedSettings, measure_speed
from tpa_convert.evaluation.report import Row
from tpa_convert.forward.comparison import compare, geometric_mean
from tpa_convert.forward.quantised import share_of_bytes
from tpa_convert.progress import Track

CHOICES = "Multiple choice (% right)"
TASKS = "lm-evaluation-harness"


def text_rows(
    models: Mapping[str, PreTrainedModel],
    blocks: Mapping[str, LongTensor],
    batch_size: int,
    track: Track,
) -> list[Row]:
    """Perplexity of each text, and how far the other models' predictions are from the first's."""
    source = next(iter(models))
    what = "Perplexity and KL" if len(models) > 1 else "Perplexity"
    rows, kl, top1 = [], dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    for name, part in blocks.items():
        texts, agreements = compare(
            models, part, batch_size=batch_size, track=track, description=f"{what} on {name}"
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
        section = f"Agreement with {'the source' if source == 'source' else source}"
        for label, unit, scores, higher in (
            ("KL divergence (nats per token)", "nats", kl, False),
            ("same likeliest token (%)", "percent", top1, True),
        ):
            shown = {m: None if m == source else v for m, v in scores.items()}
            rows.append(Row(section, label, unit, shown, higher))  # type: ignore[arg-type]
    return rows


def choice_rows(
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
                description=f"Questions of {task}, {name}",
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


def task_rows(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int,
    include_path: str | Path | None,
) -> list[Row]:
    """The headline metric of each task of lm-evaluation-harness."""
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


def cache_rows(
    models: Mapping[str, PreTrainedModel], quantised: Mapping[str, int] | None = None
) -> list[Row]:
    """What each model caches of a token, measured on the live cache; numbers count as 16 bits,
    whatever type they have here.

    Args:
        quantised: bits of the quantised caches of the first model, whose bytes are counted.
    """
    caches = {name: cache_bytes(model) for name, model in models.items()}
    per_token: dict[str, float | None] = {name: c.at(2) for name, c in caches.items()}
    whole = next(iter(per_token.values())) or 0.0
    layers = len(next(iter(caches.values())).per_layer)
    shares = {name: share_of_bytes(bits) * whole for name, bits in (quantised or {}).items()}
    per_token |= shares
    per_layer: dict[str, float | None] = {
        name: c.at(2) / len(c.per_layer) for name, c in caches.items()
    }
    per_layer |= {name: share / layers for name, share in shares.items()}
    section = "Key-value cache, measured"
    return [
        Row(section, "bytes per token", "bytes", per_token, False),
        Row(section, "bytes per token and layer", "bytes", per_layer, False),
    ]


def speed_rows(
    models: Mapping[str, PreTrainedModel], settings: SpeedSettings, track: Track
) -> list[Row]:
    """Tokens read and generated in a second."""
    speeds = measure_speed(models, settings, track=track)
    prefill: dict[str, float | None] = {name: speed.prefill for name, speed in speeds.items()}
    decode: dict[str, float | None] = {name: speed.decode for name, speed in speeds.items()}
    return [
        Row("Speed, tokens/s", "prefill", "tokens/s", prefill, True),
        Row("Speed, tokens/s", "decode", "tokens/s", decode, True),
    ]
