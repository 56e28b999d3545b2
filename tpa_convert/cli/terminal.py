"""What the command line shows of a run: errors and warnings as one line, progress, what is next.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tpa_convert.cli.help import Group
from tpa_convert.errors import UserError
from tpa_convert.export.output import is_disk_full

PROGRAM = "tpa-convert "
WORD = r"""(?:"[^"]*"|'[^']*'|\S)+"""  # perhaps with blanks between quotes
INTERRUPTED = 130  # as a shell reports a process ended by Ctrl-C

SECONDS_BETWEEN_LINES = 30.0  # of progress where no terminal is

FIRST_PROCESS = os.environ.get("RANK", "0") == "0"
"""Whether to show results; the other processes that a launcher started show nothing but errors."""

console = Console(highlight=False, quiet=not FIRST_PROCESS)
err_console = Console(stderr=True, highlight=False, quiet=not FIRST_PROCESS)


class Commands(Group):
    """Runs a command and turns what can go wrong into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt as stop:
            if not FIRST_PROCESS:
                raise typer.Exit(INTERRUPTED) from None
            fail(f"interrupted: {str(stop) or 'no unfinished output was left'}", INTERRUPTED)
        except UserError as error:
            command = self.commands.get(ctx.invoked_subcommand)
            spellings = {p.name: _spelling(p) for p in command.params} if command else {}
            fail(f"{_label('error:', 'red')} {spell_options(str(error), spellings)}", 1)
        except Exception as error:
            if hasattr(error, "exit_code"):
                raise  # a usage error, which Typer shows
            fail(f"{_label('error:', 'red')} {_explain(error)}", 1)


def spell_options(message: str, spellings: Mapping[str, str]) -> str:
    """Writes `name` as --name. A name stands in backticks, or in front: not every "text" in a
    message is an option."""
    any_name = "|".join(spellings)
    return re.sub(
        rf"`({any_name})`|^({any_name})(?=:| is missing| must be)",
        lambda match: spellings[match[0].strip("`")],
        message,
    )


def _spelling(parameter: Any) -> str:
    """--name of an option; of an argument, what the help calls it."""
    if parameter.param_type_name == "argument":
        return parameter.metavar
    return max(parameter.opts, key=len)


def fail(message: str, code: int) -> NoReturn:
    """Print one line (and the traceback, if TPA_CONVERT_TRACEBACK=1) and leave with `code`."""
    if os.environ.get("TPA_CONVERT_TRACEBACK") == "1":
        err_console.print_exception()
    # Not through rich, which would wrap it: a message is one line in a narrow terminal and a log.
    typer.echo(" ".join(message.split()), err=True)
    raise typer.Exit(code)


def _explain(error: Exception) -> str:
    if is_disk_full(error):
        return "the disk is full: free some space or write elsewhere"
    if _is_out_of_memory(error):
        return "out of memory: try a smaller batch or another device"
    first = (str(error).strip() or "no message").splitlines()[0]
    return (
        f"unexpected {type(error).__name__}: {first} "
        "(TPA_CONVERT_TRACEBACK=1 shows the traceback; please report it)"
    )


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch has no class of its own for main memory, only this message of its DefaultCPUAllocator
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _label(text: str, color: str) -> str:
    # typer.echo takes the colour away where there is no terminal, but does not heed NO_COLOR
    return text if os.environ.get("NO_COLOR") else typer.style(text, fg=color, bold=True)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    # Other packages' warnings are for their developers; ours are for the user.
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        typer.echo(f"{_label('warning:', 'yellow')} {message}", err=True)


def quiet_libraries() -> None:
    """Keep the libraries' logs and bars out of the output; our warnings become one line each."""
    warnings.showwarning = _show_warning
    if os.environ.get("TPA_CONVERT_TRACEBACK") == "1":
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("datasets", "huggingface_hub", "httpx", "lm_eval"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are raised, and shown as ours


class TokenSpeed(ProgressColumn):
    """Tokens per second since the start, for items of so many tokens each."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens

    def render(self, task: Task) -> Text:
        return Text(_speed(task.completed * self.tokens, task.elapsed or 0.0))


def _speed(tokens: float, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds else ""


def track(items: Iterable[Any], description: str, *, tokens: int = 0) -> Iterator[Any]:
    """Iterate with a progress bar on standard error; plain lines where it is not a terminal.

    Args:
        tokens: of each item, if their speed is to be shown.
    """
    if not err_console.is_terminal:
        yield from _track_in_lines(items, description, tokens)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *([TokenSpeed(tokens)] if tokens else []),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err_console) as progress:
        yield from progress.track(items, total=_length(items), description=description)


def _track_in_lines(items: Iterable[Any], description: str, tokens: int) -> Iterator[Any]:
    """A line at the beginning, and one now and then of what takes long."""
    err_console.print(f"{description} ...", soft_wrap=True)
    start = last = time.perf_counter()
    total = _length(items)
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if now - last >= SECONDS_BETWEEN_LINES and done != total:
            last = now
            of = f" of {total}" if total is not None else ""
            left = ""
            if total is not None:
                left = f", about {duration((now - start) * (total - done) / done)} left"
            err_console.print(
                f"{description}: {done}{of} after {duration(now - start)}{left}", soft_wrap=True
            )
    if tokens and done:
        speed = _speed(done * tokens, time.perf_counter() - start)
        err_console.print(f"{description}: {speed}", soft_wrap=True)


def _length(items: Iterable[Any]) -> int | None:
    return len(items) if isinstance(items, Sized) else None


def duration(seconds: float) -> str:
    """12 s, 3 min 4 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def show_next(headline: str, *lines: str) -> None:
    """What is done, and what to do next: commands to copy, perhaps with words between them."""
    width = console.width if console.is_terminal else None
    for line in ("", headline, *lines):
        is_bare_command = line.startswith(PROGRAM)
        line = f"  {line}" if is_bare_command else line
        console.print(fitted(line, width) if width else line, markup=False, soft_wrap=True)


def fitted(line: str, width: int) -> str:
    """A line in several, broken between words; a command so that it can still be copied."""
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    is_command = line.lstrip().startswith(PROGRAM)
    further, end = (indent + "    ", " \\") if is_command else (indent, "")
    lines: list[str] = []
    current = ""
    for word in re.findall(rf"--\S+ (?!-){WORD}|{WORD}", line):  # an option with its value
        if not current:
            current = indent + word
        elif len(current) + 1 + len(word) + len(end) <= width:
            current = f"{current} {word}"
        else:
            lines.append(current + end)
            current = further + word
    return "\n".join([*lines, current])
