"""Distil the source into a converted model."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tpa_convert.dtypes import named_dtype
from tpa_convert.errors import UserError
from tpa_convert.export.output import PROVENANCE_FILE, atomic_directory, atomic_file, check_output
from tpa_convert.export.save import load_converted, read_provenance, save_converted, stamp
from tpa_convert.healing import HealingReport
from tpa_convert.healing import heal as heal_model
from tpa_convert.healing.training.distributed import processes
from tpa_convert.healing.training.preparation import LOGS
from tpa_convert.options.healing import HealOptions
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline.selection import source_of
from tpa_convert.pipeline.training_text import (
    blocks_of_text,
    has_sampled_blocks,
    training_blocks,
)
from tpa_convert.progress import Track, no_tracking
from tpa_convert.reporting.charts import healing_chart
from tpa_convert.text.mixture import load_mixture
from tpa_convert.text.overlap import load_local, refuse_seen_documents
from tpa_convert.text.read import load_documents, token_blocks

VALID_BLOCKS = 32  # sequences of held-out text behind the loss shown during healing
LOSS_CHART = "loss.png"  # in the healed model's directory, and shown by its card
HEALING_SUFFIX = ".healing"  # of the directory with the checkpoints of an unfinished healing


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
    state = processes()
    provenance = read_provenance(directory)
    out = check_output(out, overwrite)
    text_blocks = blocks_of_text(options)
    mixture = load_mixture(options.text_shares, text_column=options.text_column)
    refuse_seen_documents(
        {name: documents for name, (documents, _) in mixture.items()},
        load_local(options.valid_text, text_column=options.text_column),
    )
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
            seed=0,  # of all texts and all parts of a long one, the same for all runs
        )
    checkpoints = out.with_name(out.name + HEALING_SUFFIX)
    if state.is_main_process:
        _claim_checkpoints(checkpoints, provenance, resume)
    state.wait_for_everyone()
    try:
        report = heal_model(
            student,
            teacher.model,
            tokenizer,
            training_blocks(options, text_blocks, teacher, mixture, checkpoints, track),
            settings=options,
            output_dir=checkpoints,
            resume=resume,
            valid_blocks=valid_blocks,
            progress=progress,
        )
    except BaseException:
        useful = has_sampled_blocks(checkpoints) or any(checkpoints.glob("*/checkpoint-*"))
        if state.is_main_process and not useful:
            shutil.rmtree(checkpoints, ignore_errors=True)
        raise
    if not state.is_main_process:
        return HealingResult(out, report)
    student.to("cpu", named_dtype(provenance["convert"]["plan"]["dtype"]))
    record = {
        "settings": options.model_dump(mode="json"),
        "source": asdict(teacher.reference),
        "report": {k: v for k, v in asdict(report).items() if k != "losses"},
        "chart": LOSS_CHART,
        "earlier": provenance.get("heal"),  # of a model that was healed before
        **stamp(),
    }
    healed = {k: v for k, v in provenance.items() if k != "evaluate"} | {"heal": record}
    with atomic_directory(out, overwrite) as target:
        save_converted(student, tokenizer, target, out.name, healed)
        healing_chart(report, options.tokens_per_step, target / LOSS_CHART)
        if (checkpoints / LOGS).is_dir():
            shutil.copytree(checkpoints / LOGS, target / LOGS)
    shutil.rmtree(checkpoints, ignore_errors=True)
    before, after = report.valid_loss_before, report.valid_loss_after
    if before is not None and after is not None and after > before:
        warnings.warn(
            f"healing led away from the source (held-out KL {before:.4f} -> {after:.4f}): train on "
            "more tokens or at lower rates, or keep the model as it was",
            stacklevel=2,
        )
    return HealingResult(out, report)


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
