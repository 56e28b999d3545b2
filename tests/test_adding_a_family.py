"""The README's table is what the families are, and the page on adding one can be followed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.family_table import CHECKS, README, TRAINED, parts, tables
from tests.tiny_models import BUILT_LIKE, MODELS
from tpa_convert.families.class_pair import main

ROOT = README.parent
PAGE = ROOT / "docs" / "adding-a-family.md"


def test_the_tables_in_the_readme_are_those_of_the_families() -> None:
    before, inside, after = parts(README.read_text(encoding="utf-8"))
    assert before
    assert after
    found = tables()
    assert inside == found
    assert inside.replace("experts", "nothing", 1) != found


class Collector:
    """A plugin of pytest that keeps the names of the tests."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.names += [item.name for item in items]


def test_checks_run_on_the_families_that_the_readme_says() -> None:
    """Asked of pytest: the families that each test is parametrised with."""
    collector = Collector()
    files = [str(ROOT / "tests" / f"test_families{name}.py") for name in ("", "_coded")]
    options = ["-qq", "--collect-only", "-p", "no:cacheprovider"]
    assert pytest.main([*options, *files], plugins=[collector]) == 0
    names: dict[str, set[str]] = {}
    for name in collector.names:
        if (found := re.fullmatch(r"(\w+)\[(.+)\]", name)) is not None:
            names.setdefault(found[1], set()).update(found[2].split("-"))
    for test in CHECKS:
        families = set(MODELS) - (set(BUILT_LIKE) if test in TRAINED else set())
        assert names[test] & set(MODELS) == families, test
    assert names["test_a_part_of_each_head_is_rotated"].isdisjoint(MODELS)  # negative control


def insert(text: str, anchor: str, new: str) -> str:
    """A file's text with lines after the first line that is `anchor`."""
    lines = text.splitlines(keepends=True)
    at = lines.index(anchor + "\n") + 1
    return "".join([*lines[:at], *(f"{line}\n" for line in new.splitlines()), *lines[at:]])


def test_the_page_can_be_followed_word_for_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tpa_convert", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    page = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^    (python .*)$", page, re.MULTILINE)
    edits = re.findall(r"```diff\n\+\+\+ (\S+)\n (.*)\n\+(.*)\n```", page)
    assert (len(commands), len(edits)) == (4, 5)

    write, checks, probe, tabulate = commands
    path = tmp_path / write.split(" > ")[1]
    main(write.split(" > ")[0].split("class_pair ")[1].split())
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    for name, anchor, new in edits:
        edited = tmp_path / name
        text = edited.read_text(encoding="utf-8")
        edited.write_text(insert(text, anchor, new), encoding="utf-8")
    # One process for the rest, and of the checks those that need no training.
    arguments = [*checks.split()[3:], "and (full_width or files_of)"]
    arguments[-2:] = [" ".join(arguments[-2:])]
    script = [
        "import pytest, runpy",
        f"assert pytest.main({[*arguments, '-p', 'no:cacheprovider']!r}) == 0",
        probe.split('"')[1],
        f"runpy.run_module({tabulate.split()[-1]!r}, run_name='__main__')",
        "from tpa_convert.modeling import AttentionNames, CAUSAL_LMS",
        "CAUSAL_LMS['helium'].decoder_class.attention_names = AttentionNames()",
        "probe(family_of(HeliumConfig()), HeliumConfig())",  # a wrong record does not pass
    ]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert "4 passed" in result.stdout
    assert "with pairs='neighbours' in its record it is the same" in result.stderr
    row = "| Helium | `helium` | neighbouring features rotated |\n"
    assert row in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert row not in README.read_text(encoding="utf-8")
