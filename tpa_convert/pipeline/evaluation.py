"""Measure converted models beside their source, and try them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TextStreamer, set_seed

from tpa_convert.dtypes import named_dtype
from tpa_convert.errors import UserError
from tpa_convert.evaluation import EvaluationReport
from tpa_convert.evaluation import evaluate as evaluate_models
from tpa_convert.export.save import load_converted, read_provenance, stamp, write_provenance
from tpa_convert.options.evaluation import EvaluateOptions, GenerateOptions
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline.selection import source_of, usable_device
from tpa_convert.progress import Track, no_tracking
from tpa_convert.text.read import load_texts


def evaluate(
    directories: str | Path | Sequence[str | Path],
    options: EvaluateOptions,
    *,
    against: str | SourceOptions | None = None,
    device: str = "auto",
    write_card: bool = False,
    track: Track = no_tracking,
) -> EvaluationReport:
    """Measure converted models beside their source.

    Args:
        directories: one or more outputs of `convert` and `heal`; each becomes a column.
        against: the source; by default the one recorded in the first directory.
        write_card: add the results to the directories' tpa_convert.json and README.md.

    Raises:
        UserError: directories converted from different sources, without `against`; see
            `sources.source_of` and `evaluation.evaluate` for the others.
    """
    if isinstance(directories, str | Path):
        directories = [directories]
    provenances = {Path(d).resolve(): read_provenance(d) for d in directories}
    first, provenance = next(iter(provenances.items()))
    place = usable_device(device)
    texts = None
    if options.text:
        texts = load_texts(options.text, text_column=options.text_column, split=options.split)
    # Half precision is what a GPU serves in, and what a CPU is slow in.
    saved = named_dtype(provenance["convert"]["plan"]["dtype"])
    dtype = saved if place.startswith("cuda") else torch.float32
    if against is None:
        others = _with_another_source(provenances, provenance["source"]["sha256"])
        if others:
            raise UserError(
                f"{others[0]} was converted from another source than {first}: evaluate it on its "
                "own, or name the source to compare both with (--against)"
            )
    source = source_of(first, provenance, against, device=place, dtype=dtype)
    for directory in _with_another_source(provenances, source.reference.sha256):
        if directory != first:  # of which `source_of` has warned
            warnings.warn(
                f"{source.reference.id} is not the model that {directory} was converted from "
                "(its weights differ)",
                stacklevel=2,
            )
    models: dict[str, PreTrainedModel] = {"source": source.model}
    for name, directory in _column_names(provenances).items():
        models[name], _ = load_converted(directory, dtype=dtype, device=place)
    report = evaluate_models(
        models,
        source.tokenizer,
        texts=texts,
        choices=options.choices,
        tasks=options.tasks,
        speed=options.speed,
        prompt=options.prompt,
        block_length=options.block_length,
        max_blocks=options.max_blocks,
        limit=options.limit,
        batch_size=options.batch_size,
        track=track,
    )
    if write_card:
        record = {
            "settings": options.model_dump(mode="json"),
            "report": report.to_json(),
            **stamp(),
        }
        for directory, provenance in provenances.items():
            write_provenance(directory, directory.name, {**provenance, "evaluate": record})
    return report


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


def _with_another_source(provenances: Mapping[Path, Mapping[str, Any]], sha256: str) -> list[Path]:
    """The directories whose models were not converted from the source of this digest."""
    return [d for d, record in provenances.items() if record["source"]["sha256"] != sha256]


def _column_names(directories: Mapping[Path, Mapping[str, Any]]) -> dict[str, Path]:
    """`converted` and `healed` where that tells them apart, otherwise the ends of the directories'
    paths, as short as they can be. The name `source` is the source's."""
    names = ["healed" if "heal" in record else "converted" for record in directories.values()]
    parts = 0
    while len({"source", *names}) <= len(names):
        parts += 1
        names = [str(Path(*directory.parts[-parts:])) for directory in directories]
    return dict(zip(names, directories, strict=True))
