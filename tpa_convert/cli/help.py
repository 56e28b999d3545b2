"""How the command line explains itself: plain text that no width cuts short.

The options of a command stand in panels, in the order of `PANELS`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from tpa_convert.options.declaration import ARGUMENT, PANELS

OTHER = "Help"


class Command(TyperCommand):
    """A command whose help groups the options by their panels."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_percent_signs(args))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *(p.metavar or "" for p in self.params if _is_argument(p))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {panel: [] for panel in (*PANELS, OTHER)}
        for parameter in self.get_params(ctx):
            panel = getattr(parameter, "rich_help_panel", None) or OTHER
            if _is_argument(parameter):
                panels[ARGUMENT].append((parameter.metavar or "", getattr(parameter, "help", "")))
            elif record := parameter.get_help_record(ctx):
                panels[panel].append(record)
        for panel, records in panels.items():
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)


class Group(TyperGroup):
    """A group of commands whose help says whole sentences about them."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        paragraphs = {name: (c.help or "").split("\n\n") for name, c in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, first) for name, (first, *_) in paragraphs.items()])


def example(command: str) -> str:
    """The end of a help text: a command to copy, in a line of its own."""
    return f"\b\nExample:\n  {command}"


def with_percent_signs(words: Sequence[str]) -> list[str]:
    """A per cent sign behind a blank goes to the number before it: `25 %` is `25%`."""
    joined: list[str] = []
    for word in words:
        if word == "%" and joined and re.fullmatch(r"[\d.]+", joined[-1]):
            joined[-1] += word
        else:
            joined.append(word)
    return joined


def _is_argument(parameter: Any) -> bool:
    return parameter.param_type_name == "argument"
