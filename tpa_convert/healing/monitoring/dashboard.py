"""What a healing run shows on standard error: a live panel, or plain lines where no one watches."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tpa_convert.healing.monitoring.callbacks import (
    SOURCE_PERPLEXITY,
    VALID_AGREEMENT,
    VALID_LOSS,
    VALID_PERPLEXITY,
    GracefulStop,
    Speedometer,
)
from tpa_convert.healing.training.hardware import peak_flops

MAX_WIDTH = 100
PLAIN_LINES = 100  # of training loss in a whole run, at most
BARS = "▁▂▃▄▅▆▇█"


class Dashboard(TrainerCallback):
    """Steps, losses, perplexity beside the source's, speed and memory of a run, as it goes.

    Args:
        speedometer: measures tokens per second.
        stop: tells whether the run is about to end early.
        flops_per_token: what a training token costs, for the model FLOPs utilisation (MFU), which
            is shown for GPUs whose peak is known.
        console: where to draw; by default standard error.
    """

    def __init__(
        self,
        speedometer: Speedometer,
        stop: GracefulStop,
        flops_per_token: float,
        console: Console | None = None,
    ):
        self.speedometer = speedometer
        self.stop_request = stop
        self.flops_per_token = flops_per_token
        self.console = console or Console(stderr=True, highlight=False)
        self.losses: list[float] = []
        self.training: dict[str, Any] = {}  # the newest logs
        self.held_out: dict[str, Any] = {}
        self.live: Live | None = None

    @property
    def is_live(self) -> bool:
        """Whether there is a terminal that a panel can be redrawn on."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.state = state
        self.start = time.perf_counter()
        self.peak = None
        self.cuda = args.device.type == "cuda"
        if self.cuda:
            one = peak_flops(torch.cuda.get_device_name(args.device))
            self.peak = one and one * args.world_size
        for logs in state.log_history:  # of a run that is resumed
            self._note(logs)
        if state.global_step and not self.is_live:
            self._print(["continued from its checkpoint"])
        if self.is_live:
            self.live = Live(get_renderable=self.panel, console=self.console, refresh_per_second=2)
            self.live.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        self._note(logs)
        if self.is_live:
            return
        every = math.ceil(state.max_steps / PLAIN_LINES)
        step = state.global_step
        if VALID_LOSS in logs:
            self._print(["held-out text", *self._held_out()])
        elif "loss" in logs and (step % every == 0 or step in (1, state.max_steps)):
            self._print([f"loss {logs['loss']:.4f}", *self._speed(), *self._resources()])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, with the last panel on it; also after an error."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def panel(self) -> RenderableType:
        """The state of the run."""
        step, steps = self.state.global_step, self.state.max_steps
        # Room for the ^C that a terminal echoes: on another line it would shift the panel.
        width = min(self.console.width - 3, MAX_WIDTH)
        left = self._seconds_left()
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(
            f"step {step:,}/{steps:,}",
            ProgressBar(total=max(steps, 1), completed=step),
            f"{_clock(time.perf_counter() - self.start)} elapsed"
            + ("" if left is None else f", {_clock(left)} left"),
        )
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(no_wrap=True, overflow="ellipsis")
        if self.losses:
            curve = sparkline(self.losses, width - 47)
            loss = Text(f"{self.losses[-1]:.4f}  ")
            rows.add_row("loss", loss.append(curve, "cyan").append("  nats per token", "dim"))
        else:
            rows.add_row("loss", "the first step takes longest")
        if self.held_out:
            rows.add_row("held-out text", "  ".join(self._held_out()))
        if self._speed():
            rows.add_row("speed", "  ".join(self._speed()))
        if self._resources():
            rows.add_row("training", "  ".join(self._resources()))
        asked = "stopping after this step, with a checkpoint; Ctrl-C again to abort"
        return Panel(
            Group(bar, rows),
            title="Healing",
            title_align="left",
            subtitle=asked if self.stop_request.requested else None,
            width=width,
            border_style="yellow" if self.stop_request.requested else "blue",
        )

    def _note(self, logs: dict[str, Any]) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.training = logs
        if VALID_LOSS in logs:
            self.held_out = logs

    def _held_out(self) -> list[str]:
        logs = self.held_out
        value, source = logs[VALID_PERPLEXITY], logs[SOURCE_PERPLEXITY]
        return [
            f"perplexity {value:.2f} (source {source:.2f})",
            f"KL {logs[VALID_LOSS]:.4f}",
            f"top-1 {logs[VALID_AGREEMENT]:.1%}",
        ]

    def _speed(self) -> list[str]:
        speed = self.speedometer.tokens_per_second
        if speed is None:
            return []
        cells = [f"{speed:,.0f} tokens/s"]
        if self.peak:
            cells.append(f"MFU {speed * self.flops_per_token / self.peak:.0%}")
        return cells

    def _resources(self) -> list[str]:
        cells = []
        if "learning_rate" in self.training:
            cells.append(f"learning rate {self.training['learning_rate']:.1e}")
        if self.cuda:
            cells.append(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
        return cells

    def _seconds_left(self) -> float | None:
        speed = self.speedometer.tokens_per_second
        if speed is None:
            return None
        steps = self.state.max_steps - self.state.global_step
        return steps * self.speedometer.tokens_per_step / speed

    def _print(self, cells: Sequence[str]) -> None:
        left = self._seconds_left()
        end = [] if left is None else [f"{_clock(left)} left"]
        start = f"healing: step {self.state.global_step}/{self.state.max_steps}"
        self.console.print("  ".join([start, *cells, *end]), soft_wrap=True, markup=False)


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of at most `width` characters on a logarithmic scale, means of equal stretches."""
    width = max(1, min(width, len(values)))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    logs = [math.log(max(mean, 1e-12)) for mean in means]
    low, span = min(logs), max(logs) - min(logs)
    top = len(BARS) - 1
    return "".join(BARS[round(top * (value - low) / span) if span else 0] for value in logs)


def _clock(seconds: float) -> str:
    """1:02, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
