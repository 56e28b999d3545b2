"""What a command names is looked for at once: before torch is imported, and with every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.command_line import error_of, save_source, tpa_convert
from tests.test_commands import LOADED, python
from tpa_convert.errors import UserError
from tpa_convert.options.declaration import MEASURE, Section, option
from tpa_convert.options.named import check_named
from tpa_convert.places import models
from tpa_convert.places.models import model_path

HEAL = ["heal", ".", "--out", "x"]
CONVERT = ["convert", "SOURCE", "--kv-ratio", "0.5"]
MISSING: list[tuple[list[str], str]] = [
    (["convert", "./nowhere", "--kv-ratio", "0.5", "--dry-run"], "./nowhere: no such file or"),
    (["plan", "nowhere.gguf"], "nowhere.gguf: no such file or directory"),
    (["eval", "SOURCE", "/nowhere/small"], "/nowhere/small: no such file or directory"),
    (["bench", "./nowhere"], "./nowhere: no such file or directory"),
    (["eval", "SOURCE", "--against", "./nowhere"], "./nowhere: no such file or directory"),
    (["generate", "./nowhere", "Once"], "no such directory: nowhere"),
    (["chat", "SOURCE"], "is not a converted model"),
    (["serve", "./nowhere"], "no such directory: nowhere"),
    (["inspect", "./nowhere"], "no such directory: nowhere"),
    (["report", "./nowhere", "--out", "x.html"], "no such directory: nowhere"),
    (["export", "./nowhere", "--to", "llama", "--out", "x"], "no such directory: nowhere"),
    (["heal", "./nowhere", "--text", "x", "--out", "x"], "no such directory: nowhere"),
    ([*CONVERT, "--dry-run", "--plan", "no"], "give exactly one budget"),
    ([*CONVERT, "--dry-run", "--moments", "no"], "--moments: no such file: no (check the path)"),
    (
        [*CONVERT, "--dry-run", "--import", "no.py"],
        "--import: no such file: no.py (check the",
    ),
    ([*CONVERT, "--dry-run", "--calibration", "./no"], "no such file: ./no (check the path)"),
    ([*CONVERT, "--out", "SOURCE"], "exists: choose another output directory"),
    (["eval", "SOURCE", "--text", "no.txt"], "no such file: no.txt (check the path)"),
    (["eval", "SOURCE", "--choices", "no"], "--choices: no such file: no (check the path)"),
    (["eval", "SOURCE", "--choices", "SOURCE"], "is a directory: name a file"),
    (["run", "RECIPE"], "no such file: ./no.txt (check the path)"),
    (["convert", "nobody/nothing", "--kv-ratio", "0.5", "--dry-run"], "Hub cannot be reached"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    recipe = folder / "recipe.yaml"
    source = save_source(folder / "source")
    recipe.write_text(f"source: {source}\nconvert: {{kv_ratio: 0.5}}\nheal: {{text: ./no.txt@3}}\n")
    return {"SOURCE": source, "RECIPE": recipe}


@pytest.mark.parametrize(("arguments", "words"), MISSING)
def test_what_is_not_there_is_told(
    arguments: list[str], words: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if arguments[0] != "run" and arguments[-2:] != ["--out", "SOURCE"]:  # told inside of these
        # The first that imports anything slow: it is not come to.
        monkeypatch.setattr("tpa_convert.cli.commands.quiet_libraries", None)
    result = tpa_convert(*(files.get(word, word) for word in arguments))
    assert words in error_of(result)


@pytest.mark.parametrize("name", ["./nowhere", "no/where/at-all"])
def test_a_path_that_is_not_there_does_not_wait_for_torch(name: str) -> None:
    arguments = ["/usr/bin/tpa-convert", "convert", name, "--kv-ratio", "0.5", "--dry-run"]
    assert "slow: []" in python("-c", LOADED.format(arguments=arguments))


def test_a_name_of_the_hub_stays_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of such a name only the Hub can tell whether it is right, and is asked for the config."""
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        return "/somewhere/0123abc"

    monkeypatch.setattr(models, "snapshot_download", download)
    for name in ("gpt2", "some-org/model"):
        assert model_path(name) is None
        models.check_model(name, "v1")
    assert asked == [(n, "v1", ["config.json"]) for n in ("gpt2", "some-org/model")]


class Inner(Section):
    kept: Path | None = option(None, "Not read.", MEASURE)
    read: Path | None = option(None, "Read.", MEASURE, reads="file")


class Outer(Section):
    inner: Inner = option(Inner(), "Inside.", MEASURE)


def test_only_what_is_read_is_looked_for(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.touch()
    check_named(Outer(inner=Inner(kept=tmp_path / "not", read=there)))
    with pytest.raises(UserError, match=r"`read`: no such file: .*/not "):
        check_named(Outer(inner=Inner(read=tmp_path / "not")))
