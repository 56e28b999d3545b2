"""What the command line shows: errors and warnings as one line, progress bars, small tables.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
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
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from tpa_convert.errors import UserError
from tpa_convert.export.output import is_disk_full

if TYPE_CHECKING:
    import torch

    from tpa_convert.modeling import LayerShape
    from tpa_convert.pipeline import HealingResult, PlanningResult
    from tpa_convert.pipeline.prediction import Prediction
    from tpa_convert.plans import Plan

LAYERS_ACROSS = 10  # in the table of an uneven plan
INTERRUPTED = 130  # as a shell reports a process ended by Ctrl-C

FIRST_PROCESS = os.environ.get("RANK", "0") == "0"
"""Whether to show results; the other processes that a launcher started show nothing but errors."""

console = Console(highlight=False, quiet=not FIRST_PROCESS)
err_console = Console(stderr=True, highlight=False, quiet=not FIRST_PROCESS)


class Commands(TyperGroup):
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
            names = [option.name for option in command.params] if command else []
            fail(f"{_label('error:', 'red')} {spell_options(str(error), names)}", 1)
        except Exception as error:
            if hasattr(error, "exit_code"):
                raise  # a usage error, which Typer shows
            fail(f"{_label('error:', 'red')} {_explain(error)}", 1)


def spell_options(message: str, names: Iterable[str]) -> str:
    """Writes `name` as --name. A name stands in backticks, or in front: not every "text" in a
    message is an option."""
    any_name = "|".join(names)
    return re.sub(
        rf"`({any_name})`|^({any_name})(?=:| is missing)",
        lambda match: "--" + match[0].strip("`").replace("_", "-"),
        message,
    )


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
        err_console.print(f"{description} ...")
        start, done = time.perf_counter(), 0
        for item in items:
            yield item
            done += tokens
        if done:
            err_console.print(f"{description}: {_speed(done, time.perf_counter() - start)}")
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
        total = len(items) if isinstance(items, Sized) else None
        yield from progress.track(items, total=total, description=description)


def show_plan(prediction: Prediction) -> None:
    """What is cached before and after, and the shapes of the layers."""
    plan = prediction.plan
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in ("source", "converted", "kept"):
        table.add_column(column, justify="right")
    unit = str(prediction.cache_dtype).removeprefix("torch.")
    for name, before, after in (
        (f"cache bytes per token ({unit})", prediction.source_kv_bytes, prediction.kv_bytes),
        ("cached numbers per token and layer", plan.source_kv_floats, plan.kv_floats),
        ("parameters", prediction.source_parameters, prediction.parameters),
    ):
        table.add_row(
            name,
            f"{before:,}",
            f"{after:,.6g}" if after < 1e6 else f"{after:,}",
            f"{after / before:.1%}",
        )
    console.print(table)
    show_layers(plan.layers)
    _show_rebuilding(plan, prediction.cache_dtype)


def show_layers(layers: Sequence[LayerShape]) -> None:
    """One line on layers that are all alike; else their numbers in a table, ten layers across."""
    kept_as = {layer.key_cache for layer in layers}
    key = "latent key" if kept_as == {"latent"} else "key"
    rows: dict[str, list[int | None]] = {
        f"{key} width": [layer.width_k for layer in layers],
        "value width": [layer.width_v for layer in layers],
    }
    if any(layer.contextual for layer in layers):
        # the rank of a static layer follows from its decomposition, so a plan cannot know it
        rows["key rank"] = [layer.rank_k if layer.contextual else None for layer in layers]
        rows["value rank"] = [layer.rank_v if layer.contextual else None for layer in layers]
    if len(set(zip(*rows.values(), strict=True))) > 1:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column()
        for _ in range(LAYERS_ACROSS):
            table.add_column(justify="right", no_wrap=True)
        for start in range(0, len(layers), LAYERS_ACROSS):
            across = range(start, min(start + LAYERS_ACROSS, len(layers)))
            table.add_row("layer", *map(str, across), style="dim")
            for name, numbers in rows.items():
                table.add_row(name, *(str(numbers[i] or "–") for i in across))
            table.add_row()
        console.print(table)
        widths = ""
    else:
        widths = "; " + ", ".join(f"{name} {numbers[0]}" for name, numbers in rows.items())
    kinds: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        kind = f"{layer.form} head factors, gauge {layer.value_gauge}"
        if len(kept_as) > 1:
            kind += f", {layer.key_cache} keys"
        kinds.setdefault(kind, []).append(i)
    for kind, where in kinds.items():
        console.print(f"{'layers' if len(where) > 1 else 'layer'} {_ranges(where)}: {kind}{widths}")


def _ranges(numbers: Sequence[int]) -> str:
    """1, 3-5 for 1, 3, 4, 5."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in pairs)


def _show_rebuilding(plan: Plan, cache_dtype: torch.dtype) -> None:
    from tpa_convert.plans.cost import rebuilding_per_byte

    operations = rebuilding_per_byte(plan, cache_dtype)
    if operations:
        unit = str(cache_dtype).removeprefix("torch.")
        console.print(
            f"every step rebuilds the keys of the context: {operations:.0f} operations per cached "
            f"byte ({unit}); an H100 has time for about 300 while it reads one"
        )


def show_planning(result: PlanningResult) -> None:
    """All candidates, the chosen one marked, and what they cost."""
    report = result.report
    unit = str(result.cache_dtype).removeprefix("torch.")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    columns = ["bytes/token", "kept", "predicted", "perplexity", "KL"]
    columns += ["context"] if result.memory is not None else []
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    previous = report.candidates[0].budget
    for i, candidate in enumerate(report.candidates):
        if candidate.budget != previous:
            table.add_section()
            previous = candidate.budget
        plan, chosen = candidate.plan, i == report.chosen
        name = candidate.form if candidate.form != "static" else candidate.split
        predicted = candidate.predicted_kl
        cells = [
            f"{'→' if chosen else ' '} {name}",
            f"{plan.kv_bytes(result.cache_dtype):,.0f}",
            f"{plan.kv_floats / plan.source_kv_floats:.1%}",
            "" if predicted is None else _times(math.exp(min(predicted, 700.0))),
            _times(candidate.perplexity_ratio),
            f"{candidate.kl:.3f}",
        ]
        context = result.context(candidate)
        table.add_row(
            *cells,
            *([f"{context:,}"] if context is not None else []),
            style="bold green" if chosen else None,
        )
    console.print(table)
    for line in (
        f"Perplexity {'after refinement, before' if result.refined else 'before refinement and'} "
        f"healing, relative to the source's {report.source_perplexity:.2f} on held-out "
        f"calibration text; bytes in {unit}.",
        "uniform: the same widths everywhere; measured: widths by sensitivity; halfway: their "
        "mean. Predicted from the sensitivities, without refinement.",
        "→: the least KL at the budget, or the smallest cache within the accepted loss.",
        *(
            [
                f"Context: tokens in {result.memory / 1e9:g} GB beside the weights, "
                f"batch {result.batch_size}."
            ]
            if result.memory is not None
            else []
        ),
    ):
        console.print(line, style="dim")
    cost, source = report.candidates[report.chosen].cost, report.source_cost
    console.print(
        f"\nAttention layers of the chosen plan (→) against the source's, at {report.context:,} "
        f"tokens: weights {_times(cost.parameters / source.parameters)}, arithmetic of decoding "
        f"{_times(cost.decode_flops / source.decode_flops)}, of prefill "
        f"{_times(cost.prefill_flops / source.prefill_flops)}."
    )
    _show_rebuilding(report.plan, result.cache_dtype)


def _times(ratio: float) -> str:
    return f"×{ratio:.3f}" if ratio < 10 else f"×{ratio:.1f}" if ratio < 100 else f"×{ratio:.0f}"


def show_healing(result: HealingResult) -> None:
    """How far from the source the model was and is, and what that took."""
    report = result.report
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in ("before", "after"):
        table.add_column(column, justify="right", no_wrap=True)

    def row(name: str, points: Sequence[tuple[int, float]], shown: Callable[[float], str]) -> None:
        if points:
            table.add_row(name, *(shown(points[end][1]) for end in (0, -1)))

    row("loss on training text, first and last steps", report.losses, "{:.4f}".format)
    row("KL from the source, held-out text", report.valid_losses, "{:.4f}".format)
    source = report.source_perplexity
    if source is not None:
        points = report.valid_perplexities
        row(f"perplexity, held-out text (source {source:.2f})", points, "{:.2f}".format)
        row("  against the source", points, lambda value: _times(value / source))
        row("  same likeliest token", report.valid_agreements, "{:.1%}".format)
    console.print(table)
    if report.recovered:
        console.print(f"Stopped early, after {report.steps} steps: recovered as far as asked.")
    resumed = f" (this time from step {report.resumed_from} on)" if report.resumed_from else ""
    speed = f", {report.tokens_per_second:,.0f} tokens/s" if report.tokens_per_second else ""
    console.print(
        f"Healed on {report.tokens:,} tokens{resumed} in {duration(report.seconds)}{speed}.",
        soft_wrap=True,
    )
    console.print(f"Picture: {result.chart}", soft_wrap=True)


def duration(seconds: float) -> str:
    """12 s, 3 min 4 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
