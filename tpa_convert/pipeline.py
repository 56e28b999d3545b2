"""The steps of the command line as a Python API: plan, convert, heal, evaluate, generate.

    from tpa_convert import pipeline
    from tpa_convert.recipe import ConvertOptions, HealOptions

    pipeline.convert("HuggingFaceTB/SmolLM2-135M", "small", ConvertOptions(kv_ratio=0.5))
    pipeline.heal("small", "healed", HealOptions(text=["essays.jsonl"]))

All of them in a row, from a recipe: `tpa_convert.run`. Every function raises
`UserError` for what a user can put right, and writes whole outputs or none.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer, set_seed

from tpa_convert import healing
from tpa_convert.architectures import Source, architecture_of, read_source_config
from tpa_convert.calibration.moments import Moments, Track, collect_moments, no_tracking
from tpa_convert.calibration.text import (
    default_calibration_documents,
    load_documents,
    token_blocks,
)
from tpa_convert.conversion import convert_model
from tpa_convert.errors import UserError
from tpa_convert.evaluation import EvaluationReport
from tpa_convert.evaluation import evaluate as evaluate_models
from tpa_convert.export.output import (
    PROVENANCE_FILE,
    atomic_directory,
    atomic_file,
    check_output,
)
from tpa_convert.export.save import (
    load_converted,
    read_provenance,
    save_converted,
    stamp,
    write_provenance,
)
from tpa_convert.healing import HealingReport, HealingSettings
from tpa_convert.planner import PlanReport, search
from tpa_convert.planning import Budget, Plan, plan_to_yaml, plan_uniform
from tpa_convert.planning.cost import largest_context
from tpa_convert.planning.plan import floats_of_budget
from tpa_convert.prediction import Prediction, named_dtype, predict
from tpa_convert.recipe import (
    BUDGETS,
    CalibrationOptions,
    ConvertOptions,
    EvaluateOptions,
    HealOptions,
    PlanOptions,
    Section,
    SourceOptions,
)
from tpa_convert.refinement import RefinementSettings, refine
from tpa_convert.sources import load, source_of, source_options, usable_device

CURVE = (0.25, 1 / 3, 0.5, 2 / 3, 0.75)  # shares of the source's cache that `plan` also measures
VALID_BLOCKS = 32  # sequences of held-out text behind the loss shown during healing
HEALING_SUFFIX = ".healing"  # of the directory with the checkpoints of an unfinished healing


@dataclass(frozen=True)
class PlanningResult:
    """What `plan` found.

    Attributes:
        report: all candidates, and which one was chosen.
        cache_dtype: in which bytes are counted.
        weight_bytes: of the source, in its own type.
        memory: bytes that weights and cache may take, None if not given.
        batch_size: sequences cached at once.
        source: what the plan is for, as in the plan file.
        seconds: wall time.
    """

    report: PlanReport
    cache_dtype: torch.dtype
    weight_bytes: int
    memory: float | None
    batch_size: int
    source: dict[str, Any]
    seconds: float

    def context(self, plan: Plan) -> int | None:
        """Largest context that fits into the memory."""
        if self.memory is None:
            return None
        kv_bytes = plan.kv_bytes(self.cache_dtype)
        return largest_context(self.memory, self.weight_bytes, kv_bytes, self.batch_size)

    def to_yaml(self) -> str:
        """The chosen plan as a file for `convert`."""
        return plan_to_yaml(self.report.plan, self.source)

    def to_json(self) -> dict[str, Any]:
        """Plain values; one entry for each candidate and for each layer's sensitivity."""
        report = self.report
        return {
            "source": self.source,
            "source_perplexity": report.source_perplexity,
            "source_cost": asdict(report.source_cost),
            "chosen": report.chosen,
            "candidates": [
                {
                    "budget": candidate.budget,
                    "kv_floats": candidate.plan.kv_floats,
                    "kv_bytes": candidate.plan.kv_bytes(self.cache_dtype),
                    "form": candidate.form,
                    "split": candidate.split,
                    "predicted_kl": candidate.predicted_kl,
                    "kl": candidate.kl,
                    "perplexity_ratio": candidate.perplexity_ratio,
                    "cost": asdict(candidate.cost),
                    "context": self.context(candidate.plan),
                    "layers": [asdict(layer) for layer in candidate.plan.layers],
                }
                for candidate in report.candidates
            ],
            "sensitivity": [
                {
                    name: {"widths": part.widths, "losses": part.losses}
                    for name, part in (("keys", layer.keys), ("values", layer.values))
                }
                for layer in report.sensitivity
            ],
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class ConversionResult:
    """What `convert` made.

    Attributes:
        out: directory of the converted model.
        prediction: plan, cache bytes and parameters, as `preview` returns them.
        seconds: wall time.
    """

    out: Path
    prediction: Prediction
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), "seconds": self.seconds, **self.prediction.to_json()}


@dataclass(frozen=True)
class HealingResult:
    """What `heal` made: the directory of the healed model and the report of the training."""

    out: Path
    report: HealingReport

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), **asdict(self.report)}


def preview(source: str | SourceOptions, options: ConvertOptions) -> Prediction:
    """What a conversion would make: shapes, cache bytes, parameters. Reads no weights."""
    where = source_options(source)
    config = read_source_config(
        where.model, revision=where.revision, trust_remote_code=where.trust_remote_code
    )
    return predict(config, options)


def plan(
    source: str | SourceOptions,
    options: PlanOptions,
    *,
    device: str = "auto",
    track: Track = no_tracking,
) -> PlanningResult:
    """Measure how much each layer minds narrower keys and values, and choose their widths.

    An eighth of the calibration text is held out of the moments, and everything is measured on it.

    Args:
        source: Hub id, local directory or .gguf file, or options with a revision.
        options: budget or accepted loss, calibration, memory.
        device: cpu, cuda, cuda:1, ... or auto.
        track: shows progress, called as `track(items, description)`.
    """
    start = time.perf_counter()
    where = source_options(source)
    config = read_source_config(
        where.model, revision=where.revision, trust_remote_code=where.trust_remote_code
    )
    llama_config = architecture_of(config).llama_config(config)
    stored = config.dtype or torch.float32
    cache_dtype = named_dtype(options.cache_dtype) if options.cache_dtype else stored
    source_floats = 2 * llama_config["num_key_value_heads"] * llama_config["head_dim"]
    kv_floats = None
    if any(getattr(options, name) is not None for name in BUDGETS):
        budget = Budget(**{name: getattr(options, name) for name in BUDGETS})
        plan_uniform(llama_config, budget, cache_dtype=cache_dtype)  # refuses what cannot be
        kv_floats = floats_of_budget(
            budget, llama_config["num_hidden_layers"], source_floats, cache_dtype
        )
    loaded = load(where, device)
    blocks = _calibration_blocks(loaded, options)
    held_out = max(1, len(blocks) // 8)
    if len(blocks) <= held_out:
        raise UserError("a plan needs at least two calibration sequences: give more text")
    moments = _moments(loaded, blocks[held_out:], options, track)
    assert moments is not None
    report = search(
        loaded,
        moments,
        blocks[:held_out],
        kv_floats=kv_floats,
        max_increase=options.max_increase,
        curve=[share * source_floats for share in CURVE],
        multiple_of=options.multiple_of,
        context=options.context,
        track=track,
    )
    return PlanningResult(
        report,
        cache_dtype,
        loaded.model.num_parameters() * stored.itemsize,
        None if options.memory is None else options.memory * 1e9,
        options.batch_size,
        {"id": loaded.reference.id, "sha256": loaded.reference.sha256},
        time.perf_counter() - start,
    )


def convert(
    source: str | SourceOptions,
    out: str | Path,
    options: ConvertOptions,
    *,
    device: str = "auto",
    overwrite: bool = False,
    track: Track = no_tracking,
) -> ConversionResult:
    """Convert a model and save it to the directory `out`.

    Args:
        source: Hub id, local directory or .gguf file, or options with a revision.
        options: budget, form, method, calibration.
        device: cpu, cuda, cuda:1, ... or auto.
        track: shows progress, called as `track(items, description)`.
    """
    start = time.perf_counter()
    out = check_output(out, overwrite)
    if options.save_moments is not None and options.save_moments.exists() and not overwrite:
        raise UserError(
            f"{options.save_moments} exists: use it with --moments, or pass --overwrite"
        )
    prediction = preview(source, options)  # a wrong budget is told before anything is loaded
    loaded = load(source_options(source), device)
    with atomic_directory(out, overwrite) as directory:
        calibrated = options.moments is None and (
            options.whiten or options.form == "linear" or options.refine
        )
        blocks = _calibration_blocks(loaded, options) if calibrated else None
        model = convert_model(
            loaded,
            prediction.plan,
            _moments(loaded, blocks, options, track),
            method=options.method,
            whiten=options.whiten,
            dtype=torch.float32 if options.refine else prediction.dtype,
            track=track,
        )
        if options.refine:
            assert blocks is not None
            settings = RefinementSettings(steps=options.refine_steps, seed=options.seed)
            model = model.to(loaded.model.device)
            refine(loaded.model, model, blocks, settings, track=track)
            model = model.to(prediction.dtype)
        record = {"settings": _settings(options), "plan": prediction.to_json(), **stamp()}
        provenance = {"source": asdict(loaded.reference), "convert": record}
        save_converted(model, loaded.tokenizer, directory, out.name, provenance)
    return ConversionResult(out, prediction, time.perf_counter() - start)


def heal(
    directory: str | Path,
    out: str | Path,
    options: HealOptions,
    *,
    source: str | SourceOptions | None = None,
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> HealingResult:
    """Distil the source into the converted model in `directory`; save the result to `out`.

    Until the run is complete, its checkpoints live beside `out`, in `out` + ".healing". A GPU is
    used if there is one (CUDA_VISIBLE_DEVICES chooses).

    Args:
        source: what to learn from; by default the recorded source, which must be unchanged.
        resume: continue an interrupted run; if False, its checkpoints are deleted.
        progress: show a progress bar.

    Raises:
        HealingInterrupted: after Ctrl-C or SIGTERM; the same call continues.
    """
    provenance = read_provenance(directory)
    out = check_output(out, overwrite)
    settings = HealingSettings(**options.model_dump(exclude={"text", "valid_text", "text_column"}))
    documents = load_documents(options.text, text_column=options.text_column)
    cuda = torch.cuda.is_available()
    teacher = source_of(
        directory, provenance, source, dtype=torch.bfloat16 if cuda else torch.float32
    )
    student, tokenizer = load_converted(directory, dtype=torch.float32)
    valid_blocks = None
    if options.valid_text:
        valid_blocks = token_blocks(
            load_documents(options.valid_text, text_column=options.text_column),
            tokenizer,
            options.block_length,
            VALID_BLOCKS,
        )
    checkpoints = out.with_name(out.name + HEALING_SUFFIX)
    _claim_checkpoints(checkpoints, provenance, resume)
    try:
        report = healing.heal(
            student,
            teacher.model,
            tokenizer,
            documents,
            settings=settings,
            output_dir=checkpoints,
            resume=resume,
            valid_blocks=valid_blocks,
            progress=progress,
        )
    except BaseException:
        if not any(checkpoints.glob("checkpoints/checkpoint-*")):
            shutil.rmtree(checkpoints, ignore_errors=True)  # nothing to resume from
        raise
    student.to("cpu", named_dtype(provenance["convert"]["plan"]["dtype"]))
    record = {
        "settings": _settings(options),
        "source": asdict(teacher.reference),
        "report": {k: v for k, v in asdict(report).items() if k != "losses"},
        **stamp(),
    }
    healed = {k: v for k, v in provenance.items() if k != "evaluate"} | {"heal": record}
    with atomic_directory(out, overwrite) as target:
        save_converted(student, tokenizer, target, out.name, healed)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return HealingResult(out, report)


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
    """
    if isinstance(directories, str | Path):
        directories = [directories]
    provenances = {Path(d): read_provenance(d) for d in directories}
    first, provenance = next(iter(provenances.items()))
    place = usable_device(device)
    texts = None
    if options.text:
        texts = load_documents(options.text, text_column=options.text_column, split=options.split)
    # Half precision is what a GPU serves in, and what a CPU is slow in.
    saved = named_dtype(provenance["convert"]["plan"]["dtype"])
    dtype = saved if place.startswith("cuda") else torch.float32
    source = source_of(first, provenance, against, device=place, dtype=dtype)
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
        record = {"settings": _settings(options), "report": report.to_json(), **stamp()}
        for directory, provenance in provenances.items():
            write_provenance(directory, directory.name, {**provenance, "evaluate": record})
    return report


def generate(
    directory: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    stream: bool = False,
) -> str:
    """Continue `prompt` with a converted model.

    Args:
        temperature: 0 takes the likeliest token each time.
        stream: also print the text to standard output while it comes.

    Returns:
        The continuation, without the prompt.
    """
    place = usable_device(device)
    model, tokenizer = load_converted(directory, device=place)
    inputs = tokenizer(prompt, return_tensors="pt").to(place)
    if inputs["input_ids"].shape[1] == 0:
        raise UserError("the prompt is empty: give some text to continue")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        set_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    output = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
    )
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new_tokens, skip_special_tokens=True)


# ------------------------------------------------------------------------------- helpers


def _settings(options: Section) -> dict[str, Any]:
    return options.model_dump(mode="json")


def _calibration_blocks(source: Source, options: CalibrationOptions) -> Tensor:
    if options.calibration:
        documents = load_documents(options.calibration, text_column=options.text_column)
    else:
        documents = default_calibration_documents()
    return token_blocks(
        documents,
        source.tokenizer,
        options.block_length,
        options.calibration_blocks,
        seed=options.seed,
    )


def _moments(
    source: Source, blocks: Tensor | None, options: CalibrationOptions, track: Track
) -> Moments | None:
    if options.moments is not None:
        return Moments.load(options.moments)
    if blocks is None:
        return None
    moments = collect_moments(source, blocks, track=track)
    if options.save_moments is not None:
        with atomic_file(options.save_moments) as path:
            moments.save(path)
    return moments


def _claim_checkpoints(directory: Path, provenance: Mapping[str, Any], resume: bool) -> None:
    """Tie a directory of checkpoints to the converted model they come from."""
    if not resume:
        shutil.rmtree(directory, ignore_errors=True)
    claim = directory / PROVENANCE_FILE
    converted = {name: provenance[name] for name in ("source", "convert")}
    if claim.is_file():
        if json.loads(claim.read_text(encoding="utf-8")) != converted:
            raise UserError(
                f"{directory} holds checkpoints of another converted model: remove it, or pass "
                "--no-resume"
            )
        return
    with atomic_file(claim) as path:
        path.write_text(json.dumps(converted, indent=2) + "\n", encoding="utf-8")


def _column_names(directories: Mapping[Path, Mapping[str, Any]]) -> dict[str, Path]:
    """`converted` and `healed` where that tells them apart, otherwise the directories' names."""
    names = ["healed" if "heal" in record else "converted" for record in directories.values()]
    if len(set(names)) < len(names):
        names = [directory.name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    return dict(zip(names, directories, strict=True))
