"""Write the page that shows a converted model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tpa_convert.errors import UserError
from tpa_convert.evaluation import EvaluationReport
from tpa_convert.evaluation.sweep import SpeedReport
from tpa_convert.export.inspection import inspect
from tpa_convert.export.output import atomic_file
from tpa_convert.reporting.html import render_report


def report(directory: str | Path, out: str | Path, results: Sequence[str | Path] = ()) -> None:
    """Write a page of the model in `directory`, from what is known of it.

    Args:
        results: files that `eval --json` or `bench --json` wrote, beside what the model's own
            record has.

    Raises:
        UserError: no converted model there, or a file that holds no results.
    """
    found = [load_results(path) for path in results]
    page = render_report(
        inspect(directory),
        [one for one in found if isinstance(one, EvaluationReport)],
        [one for one in found if isinstance(one, SpeedReport)],
    )
    with atomic_file(out) as path:
        path.write_text(page, encoding="utf-8")


def load_results(path: str | Path) -> EvaluationReport | SpeedReport:
    """What `eval --json` or `bench --json` wrote.

    Raises:
        UserError: it is no such file.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        kind = SpeedReport if "points" in values else EvaluationReport
        return kind.from_json(values)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results of eval --json or bench --json") from error
