"""Evaluation and whole recipes on a tiny random model."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import CONVERT, error_of, save_source, save_text, tpa_convert
from tpa_convert.errors import UserError
from tpa_convert.healing import HealingInterrupted
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline import run as run_module


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("models") / "source")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return save_text(tmp_path / "text.txt")


@pytest.fixture
def recipe(source: Path, text: Path, tmp_path: Path) -> Path:
    other = save_text(tmp_path / "other.txt")
    values = {
        "source": str(source),
        "convert": {"kv_ratio": 0.5, "calibration_blocks": 2, "block_length": 32},
        "heal": {
            "text": str(text),
            "tokens": 128,
            "tokens_per_step": 64,
            "block_length": 32,
            "warmup_steps": 0,
        },
        "evaluate": {"text": str(other), "block_length": 32, "max_blocks": 2, "speed": False},
        "out": str(tmp_path / "out"),
        "next_steps": "Try [this] next.",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def change(recipe: Path, section: str, **values: Any) -> None:
    content = yaml.safe_load(recipe.read_text())
    content[section] |= values
    recipe.write_text(yaml.safe_dump(content))


def test_recipe_from_source_to_table(recipe: Path, tmp_path: Path) -> None:
    result = tpa_convert("run", recipe, "--json", tmp_path / "result.json")
    assert result.exit_code == 0, result.output
    for words in ("source", "converted", "healed", "bytes per token", "Try [this] next."):
        assert words in result.stdout
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "converted",
        "healed",
        "report.html",
        "report.json",
    }
    report = json.loads((out / "report.json").read_text())
    assert report["models"] == ["source", "converted", "healed"]
    rows = {row["name"]: row["values"] for row in report["rows"]}
    assert rows["bytes per token"] == {"source": 128, "converted": 64, "healed": 64}
    for name in ("converted", "healed"):
        card = (out / name / "README.md").read_text()
        assert "| **Perplexity** |" in card
        assert str(tmp_path) not in card
        record = json.loads((out / name / "tpa_convert.json").read_text())
        assert record["evaluate"]["report"] == report
    assert json.loads((tmp_path / "result.json").read_text())["evaluation"] == report


def test_finished_steps_are_kept(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise HealingInterrupted(1, 2)

    with monkeypatch.context() as patch:
        patch.setattr("tpa_convert.pipeline.healing.heal_model", interrupted)
        assert "continues from there" in error_of(tpa_convert("run", recipe), code=130)
    converted = tmp_path / "out" / "converted" / "model.safetensors"
    before = converted.stat().st_mtime_ns
    assert tpa_convert("run", recipe).exit_code == 0
    assert converted.stat().st_mtime_ns == before

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished step was done again")

    monkeypatch.setattr(run_module, "convert", never)
    monkeypatch.setattr(run_module, "heal", never)
    assert tpa_convert("run", recipe).exit_code == 0


def test_starting_over_forgets_what_was_healed_before(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tpa_convert("run", recipe).exit_code == 0

    def interrupted(*_: Any, **__: Any) -> None:
        raise HealingInterrupted(1, 2)

    with monkeypatch.context() as patch:
        patch.setattr("tpa_convert.pipeline.healing.heal_model", interrupted)
        message = error_of(tpa_convert("run", recipe, "--overwrite"), code=130)
    assert "the same command continues from there, without --overwrite" in message
    assert not (tmp_path / "out" / "healed").exists()
    assert tpa_convert("run", recipe).exit_code == 0
    assert (tmp_path / "out" / "healed" / "tpa_convert.json").is_file()


def test_other_settings_are_not_mistaken_for_finished(recipe: Path, tmp_path: Path) -> None:
    assert tpa_convert("run", recipe).exit_code == 0
    change(recipe, "heal", seed=1)
    assert "healed was made with another heal.seed" in error_of(tpa_convert("run", recipe))
    change(recipe, "convert", kv_ratio=0.25)
    assert "converted was made with another convert.kv_ratio" in error_of(
        tpa_convert("run", recipe)
    )
    assert tpa_convert("run", recipe, "--overwrite").exit_code == 0
    record = json.loads((tmp_path / "out" / "healed" / "tpa_convert.json").read_text())
    assert record["convert"]["settings"]["kv_ratio"] == 0.25
    assert record["heal"]["settings"]["seed"] == 1


def test_unknown_key_and_missing_output(recipe: Path, tmp_path: Path) -> None:
    change(recipe, "evaluate", sped=True)
    message = error_of(tpa_convert("run", recipe))
    assert message == f"error: {recipe}: unknown key evaluate.sped; did you mean speed?"
    recipe.write_text(f"source: {tmp_path}\nconvert: {{kv_ratio: 0.5}}\n")
    assert "pass --out DIR" in error_of(tpa_convert("run", recipe))


def test_dry_run_of_a_recipe(recipe: Path, tmp_path: Path) -> None:
    result = tpa_convert("run", recipe, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "50.0" in result.stdout
    assert not (tmp_path / "out").exists()


def test_eval_names_columns_after_directories(
    source: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    for name in ("half", "other"):
        out = tmp_path / name
        assert tpa_convert("convert", source, *CONVERT, "--out", out).exit_code == 0
    card = (tmp_path / "half" / "README.md").read_text()
    arguments = ["eval", tmp_path / "half", tmp_path / "other", "--text", text, "--no-speed"]
    limits = ["--block-length", 32, "--max-blocks", 2, "--json", tmp_path / "report.json"]
    assert tpa_convert(*arguments, *limits).exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["models"] == ["source", "half", "other"]
    perplexity = next(r["values"] for r in report["rows"] if r["section"] == "Perplexity")
    assert perplexity["half"] == pytest.approx(perplexity["other"])
    assert perplexity["half"] != pytest.approx(perplexity["source"])
    assert (tmp_path / "half" / "README.md").read_text() == card  # unless --write-card


@pytest.fixture
def half(source: Path, tmp_path: Path) -> Path:
    """A converted model."""
    out = tmp_path / "half"
    assert tpa_convert("convert", source, *CONVERT, "--out", out).exit_code == 0
    return out


EVAL = ["--no-speed", "--prompt", ""]


def test_eval_of_models_from_different_sources(source: Path, half: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    another_source = save_source(tmp_path / "another_source", seed=1)
    assert tpa_convert("convert", another_source, *CONVERT, "--out", other).exit_code == 0
    message = error_of(tpa_convert("eval", half, other, *EVAL))
    assert f"{other} was converted from another source than {half}" in message
    for named, stranger in ((source, other), (another_source, half)):
        with warnings.catch_warnings():
            warnings.simplefilter("always")  # by default the second of two is left out
            result = tpa_convert("eval", half, other, *EVAL, "--against", named)
        assert result.exit_code == 0, result.output
        assert f"is not the model that {stranger} was converted from" in result.stderr
        assert result.stderr.count("is not the model that") == 1


def test_a_directory_called_source_is_not_the_source(half: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    copy = shutil.copytree(half, tmp_path / "source")
    assert tpa_convert("eval", half, copy, *EVAL, "--json", report).exit_code == 0
    models = json.loads(report.read_text())["models"]
    assert models == ["source", *(f"{tmp_path.name}/{name}" for name in ("half", "source"))]


def test_the_card_of_the_current_directory_has_its_name(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    title = (half / "README.md").read_text().partition("\n# ")[2].splitlines()[0]
    monkeypatch.chdir(half)
    assert tpa_convert("eval", ".", *EVAL, "--write-card").exit_code == 0
    card = (half / "README.md").read_text()
    assert "half" in title
    assert f"\n# {title}\n" in card


def test_eval_measures_all_files_of_a_directory(half: Path, tmp_path: Path) -> None:
    texts, report = tmp_path / "texts", tmp_path / "report.json"
    for name, letter in (("a/valid.txt", "a"), ("b/valid.txt", "b"), ("b/z.txt", "c")):
        (texts / name).parent.mkdir(parents=True, exist_ok=True)
        (texts / name).write_text("\f".join([letter * 99] * 20))
    limits = ["--block-length", 32, "--max-blocks", 8, "--json", report]
    arguments = ["--text", texts / "a" / "valid.txt", "--text", texts / "b" / "valid.txt"]
    assert tpa_convert("eval", half, *EVAL, *arguments, *limits).exit_code == 0
    rows = {r["name"]: r["values"] for r in json.loads(report.read_text())["rows"]}
    a, b = (rows[str(texts / name / "valid.txt")]["source"] for name in "ab")
    assert a != pytest.approx(b)
    assert tpa_convert("eval", half, *EVAL, "--text", texts, *limits).exit_code == 0
    rows = {r["name"]: r["values"] for r in json.loads(report.read_text())["rows"]}
    assert rows["texts"]["source"] != pytest.approx(a)


def test_eval_with_missing_text(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    assert tpa_convert("convert", source, *CONVERT, "--out", out).exit_code == 0
    assert "no such file" in error_of(tpa_convert("eval", out, "--text", "./nowhere.txt"))


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (None, True),
        ("main", True),
        ("20240612", True),  # a tag, for all we know
        ("a1b2c3d", True),
        ("A1B2C3D4" * 5, True),
        ("a1b2c3e", False),
        ("0" * 39 + "a", False),
    ],
)
def test_another_commit_is_not_mistaken_for_finished(
    tmp_path: Path, asked: str | None, kept: bool
) -> None:
    record = {"source": {"id": "owner/model", "revision": "a1b2c3d4" * 5}}
    (tmp_path / "tpa_convert.json").write_text(json.dumps(record))
    source = SourceOptions(model="owner/model", revision=asked)
    if kept:
        assert run_module._finished(tmp_path, {}, source)
        return
    with pytest.raises(UserError, match=r"was made with another source\.revision"):
        run_module._finished(tmp_path, {}, source)
