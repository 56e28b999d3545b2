"""Running the command line in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tpa_convert.cli.commands import app

CONVERT = ["--kv-ratio", "0.5", "--calibration-blocks", "2", "--block-length", "32"]
"""A conversion of the tiny model that takes a second."""


def tpa_convert(*arguments: object, text: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


def error_of(result: Any, code: int = 1) -> str:
    """The one line on standard error."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def save_source(directory: Path, seed: int = 0) -> Path:
    """A tiny random GQA Llama with its tokenizer."""
    make_tiny_llama("gqa", seed=seed).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


def save_text(path: Path) -> Path:
    """A few thousand tokens, another text for every name."""
    path.write_text(f"A short text, {path.stem}, repeated. " * 200)
    return path
