"""Every command, every global option and every recipe is started once, as a user starts it.

What there is to start is read from the command line itself: a command or a recipe that is added
without being started here fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import LlamaConfig

from tests.command_line import CONVERT, save_source, save_text, tpa_convert
from tpa_convert import __version__
from tpa_convert.cli.commands import app
from tpa_convert.options.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
GLOBAL_OPTIONS = [flag for p in typer.main.get_command(app).params for flag in p.opts] + [
    "--help",
    "-h",
]

SHORT = ["--calibration-blocks", "2", "--block-length", "32"]
STARTED: dict[str, list[str]] = {
    "plan": ["SOURCE", "--kv-ratio", "0.5", "--multiple-of", "2", *SHORT],
    "convert": ["SOURCE", *CONVERT, "--out", "OUT"],
    "heal": [
        *("CONVERTED", "--text", "TEXT", "--out", "OUT", "--tokens", "128"),
        *("--tokens-per-step", "64", "--block-length", "32"),
    ],
    "eval": ["CONVERTED", "--no-speed", "--prompt", ""],
    "bench": [
        *("CONVERTED", "--batch", "1", "--batch", "2", "--context", "8", "--new-tokens", "2"),
        *("--repeats", "1"),
    ],
    "generate": ["CONVERTED", "Once", "--max-new-tokens", "2"],
    "inspect": ["CONVERTED"],
    "export": ["PLAIN", "--to", "llama", "--out", "OUT"],
    "run": ["RECIPE", "--out", "OUT"],
}
"""How each command is started; words in capitals stand for files."""

WITHOUT_RESULTS = {
    "chat": ["CONVERTED"],
    "report": ["CONVERTED", "--out", "OUT"],
    "serve": ["CONVERTED"],
}
"""Commands that have no --json, each started in a file of tests of its own."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    source, converted = save_source(folder / "source"), folder / "converted"
    assert tpa_convert("convert", source, *CONVERT, "--out", converted).exit_code == 0
    plain = folder / "plain"
    arguments = (*CONVERT, "--cache-bits", "16", "--out", plain)
    assert tpa_convert("convert", source, *arguments).exit_code == 0
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"source: {source}\nconvert: {{kv_ratio: 0.5, calibration_blocks: 2, block_length: 32}}\n"
    )
    text = save_text(folder / "text.txt")
    return {
        "SOURCE": source,
        "CONVERTED": converted,
        "PLAIN": plain,
        "RECIPE": recipe,
        "TEXT": text,
    }


def not_started(commands: Iterable[str]) -> set[str]:
    return set(commands) - set(STARTED) - set(WITHOUT_RESULTS)


def test_every_command_is_started_here() -> None:
    assert not_started(COMMANDS) == set()
    assert not_started([*COMMANDS, "new"]) == {"new"}  # it would be seen


@pytest.mark.parametrize("command", sorted(STARTED))
def test_a_command_does_its_work(command: str, files: dict[str, Path], tmp_path: Path) -> None:
    words = {**files, "OUT": tmp_path / "out"}
    results = tmp_path / "results.json"
    arguments = [words.get(word, word) for word in STARTED[command]]
    result = tpa_convert(command, *arguments, "--json", results)
    assert result.exit_code == 0, result.output
    assert results.read_text().startswith("{")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_refuses_what_it_does_not_know(command: str) -> None:
    arguments = (STARTED | WITHOUT_RESULTS)[command]
    result = tpa_convert(command, *arguments, "--no-such-option")
    assert result.exit_code == 2
    assert "No such option: --no-such-option" in result.stderr


@pytest.mark.parametrize("flag", GLOBAL_OPTIONS)
def test_a_global_option_answers(flag: str) -> None:
    result = tpa_convert(flag)
    assert result.exit_code == 0, result.output
    words = f"tpa-convert {__version__}" if flag == "--version" else "Commands:"
    assert words in result.stdout


def python(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("module", ["tpa_convert", "tpa_convert.cli"])
def test_a_module_is_a_command_line(module: str) -> None:
    assert python("-m", module, "--version") == f"tpa-convert {__version__}\n"


def documented_imports(text: str) -> list[str]:
    """The imports in the Python blocks of a Markdown text."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return re.findall(r"^(?:import|from) .*", "\n".join(blocks), re.MULTILINE)


def test_what_the_readme_imports_is_there() -> None:
    lines = documented_imports((RECIPES.parent / "README.md").read_text(encoding="utf-8"))
    assert any("tpa_convert.recipe" in line for line in lines)
    for line in lines:
        exec(line, {})
    with pytest.raises(ImportError):
        exec(documented_imports("```python\nimport tpa_convert.gone\n```")[0], {})


# ------------------------------------------------------------------------------- help

LOADED = (
    "import os, sys; sys.argv = {arguments!r}\n"
    "from tpa_convert.cli.commands import app\n"
    "try: app()\n"
    "except SystemExit: pass\n"
    "print('slow:', sorted({{'torch', 'transformers'}} & set(sys.modules)))\n"
    "print('threads:', os.environ.get('OMP_WAIT_POLICY'))\n"
)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["convert", "--help"]])
def test_help_does_not_wait_for_torch(arguments: list[str], monkeypatch) -> None:
    """And idle threads are to sleep: spinning ones take the cores from other processes."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    output = python("-c", LOADED.format(arguments=["/usr/bin/tpa-convert", *arguments]))
    assert output.endswith("slow: []\nthreads: PASSIVE\n")


def test_another_program_that_imports_the_package(monkeypatch) -> None:
    """It gets the models registered, which takes torch: so slow imports would be seen above."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    register = "import transformers; transformers.AutoConfig.for_model('tpa')"
    output = python("-c", LOADED.format(arguments=["/usr/bin/another", "--help"]) + register)
    assert output.endswith("slow: ['torch', 'transformers']\nthreads: PASSIVE\n")


def test_what_a_user_has_set_of_threads_stays(monkeypatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    output = python("-c", LOADED.format(arguments=["/usr/bin/tpa-convert", "--version"]))
    assert output.endswith("threads: ACTIVE\n")


def help_of(width: int) -> dict[str, list[str]]:
    """The help of every command at this width, in a process of its own: Typer's test runner has
    one width."""
    code = (
        "import sys, os; sys.argv = ['tpa-convert']; os.environ['COLUMNS'] = sys.orig_argv[-1]\n"
        "from tpa_convert.cli.commands import app\n"
        f"for command in {sorted(COMMANDS)!r}:\n"
        "    print('===', command)\n"
        "    app([command, '--help'], standalone_mode=False)\n"
    )
    parts = python("-c", code, str(width)).split("=== ")[1:]
    return {part.split("\n")[0]: part.split("\n")[1:] for part in parts}


def cut_short(lines: list[str], flags: set[str]) -> set[str]:
    """Flags that the help does not spell out."""
    return flags - set(" ".join(lines).replace(",", " ").split())


@pytest.mark.parametrize("width", [60, 80, 140])
def test_help_shows_every_option_in_full(width: int) -> None:
    for command, lines in help_of(width).items():
        options = [flag for parameter in COMMANDS[command].params for flag in parameter.opts]
        assert not cut_short(lines, {flag for flag in options if flag.startswith("-")})
        long = [line for line in lines if len(line) > width and "tpa-convert" not in line]
        assert not [line for line in long if len(line.split()) > 2 and "Budget" not in line]


def test_an_option_cut_short_would_be_seen() -> None:
    assert cut_short(["  --attention-learning-…  Peak"], {"--attention-learning-rate"})


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_example_of_a_command_is_one(command: str) -> None:
    lines = tpa_convert(command, "--help").stdout.splitlines()
    example = lines[lines.index("  Example:") + 1].split()
    assert example[:2] == ["tpa-convert", command]
    known = {flag for parameter in COMMANDS[command].params for flag in parameter.opts}
    assert {word for word in example if word.startswith("-")} <= known


# ------------------------------------------------------------------------------- recipes


def smollm2_config(*_: Any, **__: Any) -> LlamaConfig:
    """The shape of SmolLM2-135M: there is no network in tests."""
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_is_started(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    recipe = load_recipe(path)
    assert recipe.heal is not None
    assert recipe.evaluate is not None
    if not Path(recipe.source.model).exists():
        assert recipe.source.model.removesuffix("-Instruct") == "HuggingFaceTB/SmolLM2-135M"
        monkeypatch.setattr("tpa_convert.pipeline.conversion.read_source_config", smollm2_config)
        monkeypatch.setattr("tpa_convert.options.named.check_model", lambda *_: None)
    result = tpa_convert("run", path, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "cache bytes per token" in result.stdout


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_says_a_number_once(path: Path) -> None:
    """Its comments promise no tokens that the keys below them could contradict."""
    assert promises(path.read_text()) == []
    assert promises("# healed on 10 million tokens\ntokens: 45_000_000") == ["10 million tokens"]


def promises(recipe: str) -> list[str]:
    comments = [line.partition("#")[2] for line in recipe.splitlines()]
    return re.findall(r"\d+ million tokens", "\n".join(comments))
