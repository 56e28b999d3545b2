"""Results as files: results/*.json, of which `results.py` makes RESULTS.md.

A file holds one table with what it takes to repeat it. Scripts write theirs with `--json`; tables
of notes that are older than these files were copied, and name their note.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.machine import device_name, package_versions

FOLDER = Path(__file__).parents[1] / "results"

Cell = str | float | int | None


@dataclass(frozen=True)
class Result:
    """One table.

    Attributes:
        title: what it shows, as a heading.
        command: what printed it, in the repository's folder.
        date: of the run, YYYY-MM-DD.
        hardware: that it ran on.
        versions: of Python and the libraries.
        commit: of this repository, abbreviated; `+` behind it if files had changed since.
        columns: their headings.
        rows: one list of cells each, as long as `columns`; None where nothing was measured.
        note: the dated note that says more, a file name in notes/, or "".
    """

    title: str
    command: str
    date: str
    hardware: str
    versions: dict[str, str]
    commit: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(row)} cells for {len(self.columns)} columns")

    def markdown(self) -> str:
        """The table, and below it what it takes to repeat it."""
        lines = [f"## {self.title}\n", line(self.columns), "|---" * len(self.columns) + "|"]
        lines += [line(map(text, row)) for row in self.rows]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines.append(f"\n{self.date}, commit {self.commit}, {self.hardware}, {versions}.")
        if self.note:
            lines.append(f"More in [the note](notes/{self.note}).")
        lines.append(f"\n    {self.command}\n")
        return "\n".join(lines)


def line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def text(cell: Cell) -> str:
    """A cell as it is shown: nothing for None, four significant digits for a float."""
    return "" if cell is None else cell if isinstance(cell, str) else f"{cell:.4g}"


def of_this_run(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Result:
    """The table of the script that is running."""
    script = Path(sys.argv[0])
    return Result(
        title=title,
        command=" ".join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d"),
        hardware=device_name(),
        versions=package_versions(),
        commit=COMMIT,
        columns=list(columns),
        rows=[list(row) for row in rows],
    )


def _commit() -> str:
    """Of the checkout that this file is in; "unknown" outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


COMMIT = _commit()  # when a script starts, whatever is committed while it runs


def save(result: Result, path: str | Path) -> None:
    Path(path).write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")


def beside(path: Path) -> Path:
    """The file for the pairs of a table: comparison_paired.json for comparison.json."""
    return path.with_name(f"{path.stem}_paired{path.suffix}")


def load(path: str | Path) -> Result:
    """Raises: ValueError if a row has too few or too many cells."""
    return Result(**json.loads(Path(path).read_text(encoding="utf-8")))


def results(folder: Path = FOLDER) -> dict[str, Result]:
    """All files, by their names."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.json"))}
