"""The README's table is what the families are, and the page on adding one can be followed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.family_table import README, parts, table

ROOT = README.parent
PAGE = ROOT / "docs" / "adding-a-family.md"


def test_the_table_in_the_readme_is_that_of_the_families() -> None:
    before, inside, after = parts(README.read_text(encoding="utf-8"))
    assert before
    assert after
    assert inside == table()
    assert inside.replace("experts", "nothing", 1) != table()


def insert(text: str, anchor: str, new: str) -> str:
    """A file's text with lines after the first line that is `anchor`."""
    lines = text.splitlines(keepends=True)
    at = lines.index(anchor + "\n") + 1
    return "".join([*lines[:at], *(f"{line}\n" for line in new.splitlines()), *lines[at:]])


def test_the_page_can_be_followed_word_for_word(tmp_path: Path) -> None:
    for name in ("tpa_convert", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    page = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^    (python .*)$", page, re.MULTILINE)
    edits = re.findall(r"```diff\n\+\+\+ (\S+)\n (.*)\n\+(.*)\n```", page)
    assert (len(commands), len(edits)) == (4, 5)

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command.replace("python", sys.executable, 1),
            shell=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=280,
        )

    write, checks, probe, tabulate = commands
    assert run(write).returncode == 0
    for name, anchor, new in edits:
        path = tmp_path / name
        path.write_text(insert(path.read_text(encoding="utf-8"), anchor, new), encoding="utf-8")
    # the page's own tests, as far as they need no training
    result = run(f"{checks.removesuffix('helium')}'helium and (full_width or files_of)'")
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", result.stdout)[-1]) == 4
    assert run(probe).returncode == 0
    assert run(tabulate).returncode == 0
    row = "| Helium | `helium` | neighbouring features rotated |\n"
    assert row in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert row not in README.read_text(encoding="utf-8")
    # and a wrong record does not pass
    path = tmp_path / "tpa_convert" / "modeling" / "tpa_helium.py"
    path.write_text(path.read_text().replace('pairs="neighbours"', ""), encoding="utf-8")
    result = run(f"{checks.removesuffix('helium')}'helium and full_width'")
    assert result.returncode == 1
