"""Everything at once: source and converted models through all measurements, into one report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import LongTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.evaluation import rows
from tpa_convert.evaluation.metrics.multiple_choice import Question, load_questions, task_name
from tpa_convert.evaluation.metrics.speed import SpeedSettings, fitting_prompt
from tpa_convert.evaluation.report import EvaluationReport, Row
from tpa_convert.evaluation.texts import blocks_by_source
from tpa_convert.forward.ids import check_ids
from tpa_convert.forward.quantised import quantised_source
from tpa_convert.options.evaluation import EvaluationSettings
from tpa_convert.progress import Track, no_tracking
from tpa_convert.text.read import Text, distinct_names
from tpa_convert.text.tokens import Documents

PROMPT_TOKENS = 24  # of the evaluation text, where no prompt is given
DEFAULT_PROMPT = "Once upon a time"
SAMPLE_TOKENS = 48  # new ones, in a sample


def evaluate(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings | None = None,
    *,
    texts: Documents | Sequence[Text] | None = None,
    timing: SpeedSettings | None = None,
    include_path: str | Path | None = None,
    track: Track = no_tracking,
) -> EvaluationReport:
    """Measure models side by side.

    Args:
        models: by column name; the first is the source, to which the others are compared.
        settings: what to measure; by default `EvaluationSettings()`.
        texts: for perplexity and agreement (see `load_texts`), a row per source (see
            `blocks_by_source`).
        timing: what is timed, where the settings ask for the speed.
        include_path: directory of task files of one's own for the harness.
        track: shows progress, called as `track(items, description)`.

    Raises:
        UserError: unusable texts, questions or tasks.
    """
    inputs = _prepare(models, tokenizer, settings or EvaluationSettings(), texts)
    timing = timing or SpeedSettings()
    measured = _measure(inputs, timing, include_path, track)
    samples = _samples(inputs, track)
    return _report(inputs, measured, samples, _notes(inputs, measured, timing))


@dataclass(frozen=True)
class _Inputs:
    """What is measured, and on what, as far as it can be wrong.

    Attributes:
        settings: with blocks that fit into the context of every model.
        blocks: token blocks of the texts, by their sources.
        questions: of the multiple-choice files, by short names.
    """

    models: Mapping[str, PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    settings: EvaluationSettings
    blocks: dict[str, LongTensor]
    questions: Mapping[str, Sequence[Question]]


@dataclass(frozen=True)
class _Measured:
    """Rows in the order of the report, and the standard errors of the multiple choice."""

    rows: list[Row]
    errors: list[float]


def _prepare(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    texts: Documents | Sequence[Text] | None,
) -> _Inputs:
    """Read everything, so that what is wrong with it is found before anything slow starts."""
    contexts = [getattr(m.config, "max_position_embeddings", None) for m in models.values()]
    block_length = min([settings.block_length, *(context for context in contexts if context)])
    settings = settings.model_copy(update={"block_length": block_length})
    names = _task_names(settings.choices)
    questions = {name: load_questions(path, settings.limit) for name, path in names.items()}
    blocks: dict[str, LongTensor] = {}
    if texts is not None:
        blocks = blocks_by_source(tokenizer, texts, block_length, settings.max_blocks)
        for model in models.values():
            for found in blocks.values():
                check_ids(model, found)
    return _Inputs(models, tokenizer, settings, blocks, questions)


def _measure(
    inputs: _Inputs,
    timing: SpeedSettings,
    include_path: str | Path | None,
    track: Track,
) -> _Measured:
    models, tokenizer, settings = inputs.models, inputs.tokenizer, inputs.settings
    batch_size = settings.batch_size
    found: list[Row] = []
    errors: list[float] = []
    # Tasks come first, since their names may be wrong or the network missing.
    tasks: list[Row] = []
    if settings.tasks:
        tasks = rows.task_rows(
            models, tokenizer, settings.tasks, settings.limit, batch_size, include_path
        )
    if inputs.blocks:
        compared = with_quantised(models, settings.quantised)
        found += rows.text_rows(compared, inputs.blocks, batch_size, track)
    if inputs.questions:
        choices, errors = rows.choice_rows(models, tokenizer, inputs.questions, batch_size, track)
        found += choices
    found += tasks
    found += rows.cache_rows(models, quantised_names(settings.quantised))
    if settings.speed:
        found += rows.speed_rows(models, timing, track)
    names = [*models, *quantised_names(settings.quantised)]
    found = [row.with_columns(names) for row in found]
    return _Measured(found, errors)


def quantised_names(bits: Sequence[int]) -> dict[str, int]:
    """Columns of the source with its own cache quantised."""
    return {f"source int{count}": count for count in bits}


def with_quantised(
    models: Mapping[str, PreTrainedModel], bits: Sequence[int]
) -> dict[str, PreTrainedModel]:
    """The models, and behind them the first with its own cache quantised to so many bits."""
    source = next(iter(models.values()))
    others = {
        name: quantised_source(source, count) for name, count in quantised_names(bits).items()
    }
    return {**models, **others}


def _notes(inputs: _Inputs, measured: _Measured, timing: SpeedSettings) -> list[str]:
    """Under which conditions the rows were measured."""
    models, settings = inputs.models, inputs.settings
    notes = []
    if inputs.blocks:
        tokens = sum(part.numel() for part in inputs.blocks.values())
        agreement = ", also for the agreement" if len(models) > 1 else ""
        notes.append(f"text: {tokens:,} tokens in sequences of {settings.block_length}{agreement}")
    else:
        lost = "perplexity and agreement were" if len(models) > 1 else "perplexity was"
        notes.append(f"text: none was given (--text), so {lost} not measured")
    if inputs.questions:
        count = sum(map(len, inputs.questions.values()))
        notes.append(
            f"multiple choice: {count:,} questions, zero-shot, log-likelihood per byte, standard "
            f"error {min(measured.errors):.1f} to {max(measured.errors):.1f}"
        )
        if len(models) > 1:
            notes.append("drop: mean over tasks ± 95 % interval, compared question by question")
    if settings.quantised:
        notes.append("source int…: its own cache quantised, keys by channel, values by token")
    if settings.speed:
        notes.append(
            f"speed: {_hardware(models)}, batch {timing.batch}, prompt of "
            f"{fitting_prompt(models, timing)} tokens, {timing.new_tokens} new ones"
        )
    return notes


def _samples(inputs: _Inputs, track: Track) -> tuple[str | None, dict[str, str]]:
    """The prompt, and how each model goes on; none where no prompt is wanted."""
    prompt = inputs.settings.prompt
    if prompt is None:
        prompt = _first_words(inputs.tokenizer, inputs.blocks) if inputs.blocks else DEFAULT_PROMPT
    if not prompt:
        return None, {}
    named = list(inputs.models.items())
    return prompt, {
        name: _sample(model, inputs.tokenizer, prompt) for name, model in track(named, "Samples")
    }


def _report(
    inputs: _Inputs,
    measured: _Measured,
    samples: tuple[str | None, dict[str, str]],
    notes: list[str],
) -> EvaluationReport:
    models, settings = inputs.models, inputs.settings
    conditions = {
        "block_length": settings.block_length,
        "max_blocks": settings.max_blocks,
        "limit": settings.limit,
        "hardware": _hardware(models),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "notes": notes,
    }
    return EvaluationReport(
        (*models, *quantised_names(settings.quantised)),
        tuple(measured.rows),
        *samples,
        conditions,
    )


def _task_names(paths: Sequence[str]) -> dict[str, str]:
    """Short names of files; whole paths where the short names are the same."""
    names = distinct_names([task_name(path) for path in paths], list(paths))
    return dict(zip(names, paths, strict=True))


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


def _sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        **inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=False, pad_token_id=pad
    )
    new = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)
