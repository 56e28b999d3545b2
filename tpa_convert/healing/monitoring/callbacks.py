"""What happens during training beside the training: speed, held-out text, graceful stops."""

from __future__ import annotations

import math
import os
import signal
import statistics
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tpa_convert.errors import UserError

if TYPE_CHECKING:
    from tpa_convert.healing.training.trainer import DistillationTrainer

# Names in the Trainer's log of what is measured on held-out text; trackers group by the prefix.
VALID_LOSS = "eval_kl"
VALID_PERPLEXITY = "eval_perplexity"
SOURCE_PERPLEXITY = "eval_source_perplexity"
VALID_AGREEMENT = "eval_agreement"

WATCHED_STEPS = 10  # over which a loss is averaged before it is judged


def curve(state: TrainerState, name: str) -> tuple[tuple[int, float], ...]:
    """(step, value) of all that was logged under a name."""
    return tuple((entry["step"], entry[name]) for entry in state.log_history if name in entry)


class Intervals(TrainerCallback):
    """Logs and saves as often as was asked for now: a checkpoint brings its own run's intervals."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        state.compute_steps(args, state.max_steps)


class Speedometer(TrainerCallback):
    """Measures tokens per second between logged losses."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.marks: list[tuple[int, float]] = []  # (step, time); reading the loss synchronises

    @property
    def tokens_per_second(self) -> float | None:
        """Mean since the first logged loss, so without start-up and compilation."""
        if len(self.marks) < 2:
            return None
        (first_step, start), (last_step, end) = self.marks[0], self.marks[-1]
        return (last_step - first_step) * self.tokens_per_step / (end - start)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            self.marks.append((state.global_step, time.perf_counter()))


class LossGuard(TrainerCallback):
    """Stops a run whose loss is not finite, or far above where it began.

    The gradient of a skewed divergence vanishes for a student that is far off, so that a run that
    once left does not come back by itself.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # the last steps' losses are to be finite too

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"the healing loss is {logs['loss']} at step {state.global_step}: "
                "use lower learning rates"
            )
        losses = [loss for _, loss in curve(state, "loss")]
        window = math.ceil(WATCHED_STEPS / args.logging_steps)
        first, last = losses[0], statistics.fmean(losses[-window:])
        if last > 2 * first + 0.25:
            raise UserError(
                f"the healing loss rose from {first:.3f} to {last:.3f} by step "
                f"{state.global_step} (mean of the last steps): use lower learning rates"
            )


class Validation(TrainerCallback):
    """Compares the models on held-out blocks before the first step, every so many, and at the end.

    With `stop_at` it ends the training as soon as exp(KL) - 1, the rise of perplexity that a
    divergence stands for, is no larger. The measured rise would be a worse judge: text that
    resembles the training text can bring the student below its source's perplexity, however much
    it differs from it.
    """

    def __init__(
        self, trainer: DistillationTrainer, blocks: Tensor, every: int, stop_at: float | None
    ):
        self.trainer = trainer
        self.blocks = blocks
        self.every = every
        self.stop_at = stop_at
        self.recovered = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step == 0:
            self.measure()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step == state.max_steps or state.global_step % self.every == 0:
            should_log = control.should_log
            loss = self.measure()  # logging resets should_log, and with it the last training loss
            control.should_log = should_log
            last = state.global_step == state.max_steps
            if self.stop_at is not None and not last and math.expm1(loss) <= self.stop_at:
                self.recovered = True
                control.should_log = True
                control.should_training_stop = True

    def measure(self) -> float:
        """Log the comparison; returns the divergence."""
        found = self.trainer.compare(self.blocks)
        self.trainer.log(
            {
                VALID_LOSS: found.kl,
                VALID_PERPLEXITY: found.perplexity,
                SOURCE_PERPLEXITY: found.source_perplexity,
                VALID_AGREEMENT: found.agreement,
            }
        )
        return found.kl


class GracefulStop(TrainerCallback):
    """On the first Ctrl-C or SIGTERM, finishes the step, saves a checkpoint and ends the training.

    Several processes stop together, as soon as one of them was asked to. A context manager; a
    second signal acts as it would have without it. Inactive outside the main thread, where Python
    allows no signal handlers.

    Args:
        announce: print a line on the first signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, announce: bool = False) -> None:
        self.announce = announce
        self.requested = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.restore()
        if self.announce:
            os.write(2, b"\nstopping after this step, with a checkpoint; again to abort\n")

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        requested = self.requested
        if args.world_size > 1:
            # Asking the others waits for the GPU, so it is done where a loss is read anyway.
            if state.global_step % args.logging_steps:
                return
            requested = bool(reduce(torch.tensor(float(requested), device=args.device), "sum"))
        if requested:
            control.should_save = True
            control.should_training_stop = True
