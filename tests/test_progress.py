"""Progress as a user sees it: bars in a terminal, a line now and then where none is."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.command_line import CONVERT, save_source, save_text, tpa_convert
from tpa_convert.cli import terminal
from tpa_convert.cli.terminal import SECONDS_BETWEEN_LINES, track


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to standard error, which is no terminal."""
    file = io.StringIO()
    monkeypatch.setattr(terminal, "err_console", Console(file=file, width=40, highlight=False))
    return file


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still unless a test moves it."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now[0])
    return now


def lines_of(shown: io.StringIO, clock: list[float], items: Iterator | list, each: float) -> list:
    for _ in track(items, "measuring"):
        clock[0] += each
    return shown.getvalue().splitlines()


def test_what_takes_long_says_now_and_then_how_far_it_is(shown, clock) -> None:
    assert SECONDS_BETWEEN_LINES == 30
    assert lines_of(shown, clock, list(range(9)), each=20.0) == [
        "measuring ...",
        "measuring: 2 of 9 after 40 s, about 2 min 20 s left",
        "measuring: 4 of 9 after 1 min 20 s, about 1 min 40 s left",
        "measuring: 6 of 9 after 2 min 0 s, about 1 min 0 s left",
        "measuring: 8 of 9 after 2 min 40 s, about 20 s left",
    ]


def test_what_is_of_unknown_length_does_not_say_what_is_left(shown, clock) -> None:
    lines = lines_of(shown, clock, iter(range(2)), each=31.0)
    assert lines[1:] == ["measuring: 1 after 31 s", "measuring: 2 after 1 min 2 s"]


def test_what_is_quick_is_one_line(shown, clock) -> None:
    assert lines_of(shown, clock, list(range(9)), each=1.0) == ["measuring ..."]


def test_in_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True)
    monkeypatch.setattr(terminal, "err_console", console)
    assert list(track([1, 2], "measuring")) == [1, 2]
    assert "2/2" in file.getvalue()
    assert "measuring ..." not in file.getvalue()


def test_eval_says_what_it_does(tmp_path: Path) -> None:
    source, text = save_source(tmp_path / "source"), save_text(tmp_path / "held-out.txt")
    questions = tmp_path / "colours.jsonl"
    questions.write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
    small = tmp_path / "small"
    assert tpa_convert("convert", source, *CONVERT, "--out", small).exit_code == 0
    measured = ["--text", text, "--choices", questions, "--block-length", 32]
    result = tpa_convert("eval", small, *measured)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [
        "Loading models ...",
        "Perplexity and KL on held-out ...",
        "Questions of colours, source ...",
        "Questions of colours, converted ...",
        "Speed ...",
        "Samples ...",
    ]
    assert "none was given" not in result.stdout
    bare = tpa_convert("eval", small, "--no-speed", "--prompt", "")
    assert bare.stderr.splitlines() == ["Loading models ..."]
    assert "text: none was given (--text), so perplexity and agreement were not measured" in (
        " ".join(bare.stdout.split())
    )
