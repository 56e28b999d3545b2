"""Distil the source into a converted model."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import LongTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.dtypes import named_dtype
from tpa_convert.errors import UserError
from tpa_convert.export.output import PROVENANCE_FILE, atomic_directory, atomic_file, check_output
from tpa_convert.export.save import (
    copy_licence,
    load_converted,
    read_provenance,
    save_converted,
    stamp,
)
from tpa_convert.healing import HealingReport
from tpa_convert.healing import heal as heal_model
from tpa_convert.healing.training.checks import hidden_weight_for
from tpa_convert.healing.training.distributed import processes
from tpa_convert.healing.training.preparation import LOGS
from tpa_convert.options.healing import HealOptions
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline.recoding import coded_student
from tpa_convert.pipeline.selection import source_of
from tpa_convert.pipeline.training_text import (
    blocks_of_text,
    has_sampled_blocks,
    training_blocks,
)
from tpa_convert.progress import Track, no_tracking
from tpa_convert.reporting.charts import healing_chart
from tpa_convert.sources import Source
from tpa_convert.text.mixture import Mixture, load_mixture
from tpa_convert.text.overlap import load_local, refuse_seen_documents
from tpa_convert.text.read import load_documents, token_blocks

VALID_BLOCKS = 32  # sequences of held-out text behind the loss shown during healing
LOSS_CHART = "loss.png"  # in the healed model's directory, and shown by its card
KEPT_POINTS = 200  # of the curve of the training loss, in the record
HEALING_SUFFIX = ".healing"  # of the directory with the checkpoints of an unfinished healing

T = TypeVar("T")


@dataclass(frozen=True)
class HealingResult:
    """What `heal` made: the directory of the healed model and the report of the training."""

    out: Path
    report: HealingReport

    @property
    def chart(self) -> Path:
        """Picture of the training."""
        return self.out / LOSS_CHART

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), **asdict(self.report)}


def heal(
    directory: str | Path,
    out: str | Path,
    options: HealOptions,
    *,
    source: str | SourceOptions | None = None,
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = True,
    track: Track = no_tracking,
) -> HealingResult:
    """Distil the source into the converted model in `directory`; save the result to `out`.

    Until the run is complete, its checkpoints live beside `out`, in `out` + ".healing". A GPU is
    used if there is one (CUDA_VISIBLE_DEVICES chooses). Under a launcher, all processes call this
    and the first one writes.

    Args:
        source: what to learn from; by default the recorded source, which must be unchanged.
        resume: continue an interrupted run; if False, its checkpoints are deleted.
        progress: show a progress bar.
        track: shows progress of sampling.

    Raises:
        UserError: held-out documents are in the training text; see `healing.heal` for the others.
        HealingInterrupted: after Ctrl-C or SIGTERM; the same call continues.
    """
    prepared = _prepare(directory, check_output(out, overwrite), options, source, track)
    if processes().is_main_process:
        _claim_checkpoints(prepared, resume)
    processes().wait_for_everyone()
    report = _train(prepared, resume, progress, track)
    if processes().is_main_process:
        _save(prepared, report, overwrite)
        _warn_of_harm(report)
    return HealingResult(prepared.out, report)


@dataclass(frozen=True)
class _Prepared:
    """A healing that is ready to start.

    Attributes:
        directory: of the converted model.
        provenance: of the converted model.
        mixture: training text; `text_blocks` blocks are taken from it.
    """

    directory: Path
    out: Path
    options: HealOptions
    provenance: Mapping[str, Any]
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: Source
    mixture: Mixture
    text_blocks: int
    valid_blocks: LongTensor | None

    @property
    def checkpoints(self) -> Path:
        """Directory of the unfinished run, beside the output."""
        return self.out.with_name(self.out.name + HEALING_SUFFIX)


def _prepare(
    directory: str | Path,
    out: Path,
    options: HealOptions,
    source: str | SourceOptions | None,
    track: Track,
) -> _Prepared:
    """Read and check everything: text first, since models take longer to load."""
    provenance = read_provenance(directory)
    text_blocks = blocks_of_text(options)
    mixture = load_mixture(options.text_shares, text_column=options.text_column)
    refuse_seen_documents(
        {name: documents for name, (documents, _) in mixture.items()},
        load_local(options.valid_text, text_column=options.text_column),
    )
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    teacher = source_of(directory, provenance, source, dtype=dtype)
    student, tokenizer = load_converted(directory, dtype=torch.float32)
    if options.kv_ratio is not None:
        student, provenance = coded_student(student, tokenizer, provenance, options.kv_ratio, track)
    return _Prepared(
        directory=Path(directory),
        out=out,
        options=options,
        provenance=provenance,
        student=student,
        tokenizer=tokenizer,
        teacher=teacher,
        mixture=mixture,
        text_blocks=text_blocks,
        valid_blocks=_valid_blocks(options, tokenizer),
    )


def _valid_blocks(options: HealOptions, tokenizer: PreTrainedTokenizerBase) -> LongTensor | None:
    if not options.valid_text:
        return None
    return token_blocks(
        load_documents(options.valid_text, text_column=options.text_column),
        tokenizer,
        options.block_length,
        VALID_BLOCKS,
        seed=0,  # of all texts and all parts of a long one, the same for all runs
    )


def _train(prepared: _Prepared, resume: bool, progress: bool, track: Track) -> HealingReport:
    """Heal the student in place. An error leaves no checkpoints that are of no use."""
    options, teacher, checkpoints = prepared.options, prepared.teacher, prepared.checkpoints
    try:
        blocks = training_blocks(
            options, prepared.text_blocks, teacher, prepared.mixture, checkpoints, track
        )
        return heal_model(
            prepared.student,
            teacher.model,
            prepared.tokenizer,
            blocks,
            settings=options,
            output_dir=checkpoints,
            resume=resume,
            valid_blocks=prepared.valid_blocks,
            progress=progress,
        )
    except BaseException:
        useful = has_sampled_blocks(checkpoints) or any(checkpoints.glob("*/checkpoint-*"))
        if processes().is_main_process and not useful:
            shutil.rmtree(checkpoints, ignore_errors=True)
        raise


def _save(prepared: _Prepared, report: HealingReport, overwrite: bool) -> None:
    """Write the healed model, what it went through and its curves; the checkpoints go."""
    provenance, checkpoints = prepared.provenance, prepared.checkpoints
    student = prepared.student
    student.to("cpu", named_dtype(provenance["convert"]["plan"]["dtype"]))
    record = {
        "settings": prepared.options.model_dump(mode="json"),
        "hidden_weight": hidden_weight_for(
            student, prepared.teacher.model, prepared.options.hidden_weight
        ),
        "source": asdict(prepared.teacher.reference),
        "report": asdict(report) | {"losses": thinned(report.losses)},
        "chart": LOSS_CHART,
        "earlier": provenance.get("heal"),  # of a model that was healed before
        **stamp(),
    }
    healed = {k: v for k, v in provenance.items() if k != "evaluate"} | {"heal": record}
    with atomic_directory(prepared.out, overwrite) as target:
        save_converted(student, prepared.tokenizer, target, prepared.out.name, healed)
        copy_licence(prepared.directory, target)
        healing_chart(report, prepared.options.tokens_per_step, target / LOSS_CHART)
        if (checkpoints / LOGS).is_dir():
            shutil.copytree(checkpoints / LOGS, target / LOGS)
    shutil.rmtree(checkpoints, ignore_errors=True)


def thinned(points: Sequence[T]) -> list[T]:
    """At most `KEPT_POINTS` of a curve, its ends among them."""
    last = len(points) - 1
    count = min(len(points), KEPT_POINTS)
    return [points[round(i * last / max(count - 1, 1))] for i in range(count)]


def _warn_of_harm(report: HealingReport) -> None:
    before, after = report.valid_loss_before, report.valid_loss_after
    if before is not None and after is not None and after > before:
        warnings.warn(
            f"healing led away from the source (held-out KL {before:.4f} -> {after:.4f}): train on "
            "more tokens or at lower rates, or keep the model as it was",
            stacklevel=3,
        )


def _claim_checkpoints(prepared: _Prepared, resume: bool) -> None:
    """Tie the directory of checkpoints to the converted model they come from."""
    directory = prepared.checkpoints
    if not resume:
        shutil.rmtree(directory, ignore_errors=True)
    claim = directory / PROVENANCE_FILE
    converted = {name: prepared.provenance[name] for name in ("source", "convert")}
    if claim.is_file():
        if json.loads(claim.read_text(encoding="utf-8")) != converted:
            raise UserError(
                f"{directory} holds checkpoints of another converted model: remove it, or pass "
                "--no-resume"
            )
        return
    with atomic_file(claim) as path:
        path.write_text(json.dumps(converted, indent=2) + "\n", encoding="utf-8")
