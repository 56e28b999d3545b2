"""A chat in the terminal: answers as they come, and under them what the cache takes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Group
from rich.filesize import decimal
from rich.live import Live
from rich.text import Text

from tpa_convert.cli.terminal import console, err_console
from tpa_convert.errors import UserError

if TYPE_CHECKING:
    from tpa_convert.pipeline.chat import Chat, Progress

PROMPT = "> "
HELP = "/clear begins another chat, /quit or Ctrl-D ends it, Ctrl-C stops an answer."


def converse(chat: Chat) -> None:
    """Answers what is typed, or what comes in line by line, until there is no more."""
    typed = sys.stdin.isatty() and console.is_terminal
    if typed:
        console.print(HELP, style="dim")
    while (line := _next_line(typed)) is not None:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/clear":
            chat.clear()
        elif text:
            try:
                _answer(chat, text, typed)
            except UserError as error:
                if not typed:
                    raise
                console.print(str(error), style="red", markup=False)
            except KeyboardInterrupt:
                if not typed:
                    raise
                console.print("stopped", style="dim")


def _next_line(typed: bool) -> str | None:
    try:
        return input(PROMPT) if typed else next(sys.stdin, None)
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(chat: Chat, text: str, live: bool) -> None:
    if not live:
        done = chat.say(text, lambda _: None)
        console.print(done.text, markup=False, soft_wrap=True)
        err_console.print(figures(done), markup=False, soft_wrap=True)
        return
    shown, last = 0, None  # characters that stand above the live part for good, and the newest
    try:
        with Live(console=console, refresh_per_second=12, transient=True) as view:

            def watch(progress: Progress) -> None:
                nonlocal shown, last
                last = progress
                end = progress.text.rfind("\n", shown)
                if end >= 0:
                    view.console.print(progress.text[shown:end], markup=False)
                    shown = end + 1
                status = Text(figures(progress), style="dim")
                view.update(Group(Text(progress.text[shown:]), status))

            last = chat.say(text, watch)
    finally:  # also of an answer that was stopped
        if last is not None:
            console.print(last.text[shown:], markup=False)
            console.print(figures(last), style="dim", markup=False)


def figures(progress: Progress) -> str:
    """One line: speed, and the cache beside what the source's would be."""
    speed = f", {progress.speed:.1f} tokens/s" if progress.speed else ""
    share = progress.cache_bytes / max(progress.source_bytes, 1)
    return (
        f"{progress.tokens} tokens{speed}; cache {decimal(progress.cache_bytes)} for "
        f"{progress.cached_tokens} tokens, the source's {decimal(progress.source_bytes)} "
        f"({share:.0%})"
    )
