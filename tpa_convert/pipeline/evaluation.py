"""Measure models beside their source, and try them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from tpa_convert.errors import UserError
from tpa_convert.evaluation import EvaluationReport
from tpa_convert.evaluation import evaluate as evaluate_models
from tpa_convert.export.save import load_converted, stamp, write_provenance
from tpa_convert.options.evaluation import EvaluateOptions, GenerateOptions
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline.selection import (
    load,
    recorded_source,
    source_options,
    usable_device,
    warn_of_another_source,
)
from tpa_convert.pipeline.subjects import (
    Subject,
    column_names,
    refuse_other_vocabularies,
    subjects,
)
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source
from tpa_convert.text.read import load_texts

SOURCE = "source"  # the name of its column


def evaluate(
    models: str | Path | Sequence[str | Path],
    options: EvaluateOptions,
    *,
    against: str | SourceOptions | None = None,
    device: str = "auto",
    write_card: bool = False,
    track: Track = no_tracking,
) -> EvaluationReport:
    """Measure models side by side: a source, and those that were made from it.

    Args:
        models: one or more; each becomes a column. Directories of converted models, or any other
            models by directory, Hub id or .gguf file.
        against: the source; by default the one that converted models record. Where none does, the
            models are measured without it, and compared with the first of them.
        write_card: add the results to the tpa_convert.json and README.md of converted models.

    Raises:
        UserError: models converted from different sources, without `against`; models with
            different vocabularies; a card for models that do not say how they were made; see
            `selection.recorded_source` and `evaluation.evaluate` for the others.
    """
    measured = subjects(models)
    if write_card:
        _refuse_missing_records(measured)
    texts = None
    if options.text:
        texts = load_texts(options.text, text_column=options.text_column, split=options.split)
    columns, tokenizer = load_side_by_side(measured, against, device, track)
    report = evaluate_models(columns, tokenizer, options, texts=texts, track=track)
    if write_card:
        _write_cards(measured, options, report)
    return report


def load_side_by_side(
    measured: Sequence[Subject],
    against: str | SourceOptions | None,
    device: str,
    track: Track = no_tracking,
) -> tuple[dict[str, PreTrainedModel], PreTrainedTokenizerBase]:
    """Models by the names of their columns, the source first if there is one, and the tokenizer
    of the first.

    The source is there once, whether or not the user names it among the models.

    Raises:
        UserError: see `evaluate`.
    """
    place = usable_device(device)
    saved = next((s for s in measured if s.directory is not None), measured[0]).saved_dtype
    # Half precision is what a GPU serves in, and what a CPU is slow in.
    dtype = saved if place.startswith("cuda") else torch.float32
    source: Source | None = None
    found: list[tuple[Subject, PreTrainedModel]] = []
    tokenizer = None
    for subject in track([None, *measured], "Loading models"):
        if subject is None:
            source = _source(measured, against, place, dtype)
            tokenizer = source.tokenizer if source else None
            continue
        loaded = subject.load(dtype, place)
        if not isinstance(loaded, Source):
            found.append((subject, loaded))
            tokenizer = tokenizer or subject.tokenizer()
        elif source is None or loaded.reference.sha256 != source.reference.sha256:
            found.append((subject, loaded.model))
            tokenizer = tokenizer or loaded.tokenizer
    models: dict[str, PreTrainedModel] = {SOURCE: source.model} if source else {}
    names = column_names([subject for subject, _ in found], taken=list(models))
    models |= {name: model for name, (_, model) in zip(names, found, strict=True)}
    refuse_other_vocabularies(models)
    assert tokenizer is not None
    return models, tokenizer


def _source(
    measured: Sequence[Subject],
    against: str | SourceOptions | None,
    device: str,
    dtype: torch.dtype,
) -> Source | None:
    """What the models are compared with: what the user names, or else the recorded source."""
    recorded = [s for s in measured if s.provenance is not None]
    if against is not None:
        source = load(source_options(against), device, dtype)
        for subject in recorded:
            if subject.source_sha256 != source.reference.sha256:
                warn_of_another_source(source, subject.place, stacklevel=4)
        return source
    if not recorded:
        return None
    first, *others = recorded
    for other in others:
        if other.source_sha256 != first.source_sha256:
            raise UserError(
                f"{other.place} was converted from another source than {first.place}: evaluate it "
                "on its own, or name the source to compare both with (--against)"
            )
    assert first.provenance is not None
    return recorded_source(first.place, first.provenance, device=device, dtype=dtype)


def _refuse_missing_records(measured: Sequence[Subject]) -> None:
    if all(subject.directory is None for subject in measured):
        raise UserError("none of these models is a converted one: leave out --write-card")
    for subject in measured:
        if subject.directory is not None and subject.provenance is None:
            raise UserError(
                f"{subject.place} does not say how it was converted (no tpa_convert.json in it), "
                "so it gets no card: leave out --write-card"
            )


def _write_cards(
    measured: Sequence[Subject], options: EvaluateOptions, report: EvaluationReport
) -> None:
    record = {
        "settings": options.model_dump(mode="json"),
        "report": report.to_json(),
        **stamp(),
    }
    for subject in measured:
        if subject.directory is not None and subject.provenance is not None:
            provenance = {**subject.provenance, "evaluate": record}
            write_provenance(subject.directory, subject.directory.name, provenance)


def generate(
    directory: str | Path,
    prompt: str,
    options: GenerateOptions | None = None,
    *,
    device: str = "auto",
    stream: bool = False,
) -> str:
    """Continue `prompt` with a converted model.

    Args:
        options: length of the continuation, and how to choose tokens.
        stream: also print the text to standard output while it comes.

    Returns:
        The continuation, without the prompt.
    """
    options = options or GenerateOptions()
    place = usable_device(device)
    model, tokenizer = load_converted(directory, device=place)
    inputs = tokenizer(prompt, return_tensors="pt").to(place)
    if inputs["input_ids"].shape[1] == 0:
        raise UserError("the prompt is empty: give some text to continue")
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        set_seed(options.seed)
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": options.top_p,
        }
    output = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
    )
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new_tokens, skip_special_tokens=True)
