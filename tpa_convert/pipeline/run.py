"""Everything a recipe says, in order; an interrupted run continues where it was."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpa_convert.errors import UserError
from tpa_convert.evaluation import EvaluationReport
from tpa_convert.evaluation.metrics.multiple_choice import load_questions
from tpa_convert.export.output import atomic_file, check_output
from tpa_convert.export.save import read_provenance
from tpa_convert.options.declaration import Section
from tpa_convert.options.recipe import Recipe
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline import ConversionResult, HealingResult, convert, evaluate, heal
from tpa_convert.pipeline.report import report
from tpa_convert.progress import Track, no_tracking
from tpa_convert.text.overlap import load_local, refuse_seen_documents


@dataclass(frozen=True)
class RunResult:
    """What `run` made. Steps that an earlier run had finished, or the recipe lacks, are None;
    `page` shows the last model."""

    converted: Path
    healed: Path | None
    conversion: ConversionResult | None
    healing: HealingResult | None
    evaluation: EvaluationReport | None
    page: Path

    def to_json(self) -> dict[str, Any]:
        steps = {name: getattr(self, name) for name in ("conversion", "healing", "evaluation")}
        return {
            "converted": str(self.converted),
            "healed": None if self.healed is None else str(self.healed),
            "page": str(self.page),
            **{name: step and step.to_json() for name, step in steps.items()},
        }


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
    track: Track = no_tracking,
) -> RunResult:
    """Do what a recipe says, in `out` (or the recipe's): converted/, healed/, report.json and
    report.html.

    Steps that an earlier run with the same settings has finished are kept.

    Args:
        overwrite: do every step again.
        progress: show progress bars.
        track: shows progress of the steps that have no bar of their own.

    Raises:
        UserError: a step failed, an earlier run in `out` had other settings, or documents of the
            evaluation are in the training text.
    """
    base = recipe.results(out)
    converted, healed = base / "converted", base / "healed" if recipe.heal else None
    sections: dict[str, Section] = {"convert": recipe.convert}

    _refuse_seen_evaluation(recipe)
    conversion = None
    if overwrite or not _finished(converted, sections, recipe.source):
        conversion = convert(
            recipe.source,
            converted,
            recipe.convert,
            device=recipe.device,
            overwrite=overwrite,
            track=track,
        )
        if overwrite and healed is not None and healed.exists():
            shutil.rmtree(check_output(healed, overwrite))  # another conversion's

    healing = None
    if healed is not None and recipe.heal is not None:
        sections["heal"] = recipe.heal
        if overwrite or not _finished(healed, sections, recipe.source):
            healing = heal(
                converted,
                healed,
                recipe.heal,
                source=recipe.source,
                overwrite=overwrite,
                resume=not overwrite,
                progress=progress,
                track=track,
            )

    evaluation = None
    if recipe.evaluate is not None:
        evaluation = evaluate(
            [converted, healed] if healed else converted,
            recipe.evaluate,
            against=recipe.source,
            device=recipe.device,
            write_card=True,
            track=track,
        )
        with atomic_file(base / "report.json") as path:
            path.write_text(json.dumps(evaluation.to_json(), indent=2) + "\n", encoding="utf-8")
    page = base / "report.html"
    report(healed or converted, page)
    return RunResult(converted, healed, conversion, healing, evaluation, page)


def _refuse_seen_evaluation(recipe: Recipe) -> None:
    """Before hours of work, refuse to judge them by local text that the model is trained on."""
    if recipe.evaluate is None:
        return
    measured = recipe.evaluate
    held_out: dict[str, Any] = dict(load_local(measured.text, text_column=measured.text_column))
    for path in measured.choices:
        questions = load_questions(path)
        held_out[path] = [question.query for question in questions]
        held_out[f"{path} (answered)"] = [f"{q.query} {q.choices[q.gold]}" for q in questions]
    if not held_out:
        return
    training = load_local(recipe.convert.calibration, text_column=recipe.convert.text_column)
    if recipe.heal is not None:
        names = [name for name, _ in recipe.heal.text_shares]
        training |= load_local(names, text_column=recipe.heal.text_column)
    refuse_seen_documents(training, held_out)


def _finished(directory: Path, sections: Mapping[str, Section], source: SourceOptions) -> bool:
    """Whether an earlier run made `directory` with the same settings."""
    if not directory.exists():
        return False
    record = read_provenance(directory)
    differing = [
        f"{step}.{name}"
        for step, options in sections.items()
        for name, value in options.model_dump(mode="json").items()
        if record.get(step, {}).get("settings", {}).get(name) != value
    ]
    if _another_commit(source.revision, record["source"]["revision"]):
        differing.insert(0, "source.revision")
    if record["source"]["id"] not in (source.model, str(Path(source.model).expanduser().resolve())):
        differing.insert(0, "source")
    if differing:
        raise UserError(
            f"{directory} was made with another {differing[0]}: choose another --out, or pass "
            "--overwrite to start over"
        )
    return True


def _another_commit(asked: str | None, recorded: str | None) -> bool:
    """Whether `asked` names another commit than the recorded one, as far as it tells by itself.

    A branch or a tag does not, and digits alone may be a tag that is a date.
    """
    commit = (asked or "").lower()
    if not re.fullmatch("[0-9a-f]{7,40}", commit) or commit.isdigit():
        return False
    return not (recorded or "").startswith(commit)
