"""Tasks of lm-evaluation-harness (extra `eval`), run on models that are already loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.tasks import TaskManager

# Shown in the table, the first of these that a task has; all metrics are kept in the results.
HEADLINE_METRICS = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity")


@dataclass(frozen=True)
class TaskResult:
    """What lm-evaluation-harness says of one task (or group of tasks).

    Attributes:
        metrics: by name as the harness has them, without filter names ("acc_norm": 0.42).
        higher_is_better: per metric, where the harness knows.
    """

    metrics: dict[str, float]
    higher_is_better: dict[str, bool]

    @property
    def headline(self) -> str | None:
        """The name of the metric for a table, if there is any."""
        names = [n for n in self.metrics if not n.endswith("_stderr")]
        return next((n for n in HEADLINE_METRICS if n in names), names[0] if names else None)


def run_tasks(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
) -> dict[str, dict[str, TaskResult]]:
    """Run tasks on each model: `result[model][task]`.

    Args:
        tasks: names of tasks or groups that the harness knows, or that lie in `include_path`.
        limit: questions per task.
        include_path: directory of task files (YAML) of one's own.

    Raises:
        UserError: lm-eval is not installed, no such task, or a data set that cannot be fetched.
    """
    if find_spec("lm_eval") is None:
        raise UserError("tasks need lm-evaluation-harness: pip install 'tpa-convert[eval]'")
    with _quiet("lm_eval"):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        known = _task_manager(tasks, include_path)
        results = {}
        for name, model in models.items():
            adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            try:
                output = simple_evaluate(
                    model=adapter, tasks=list(tasks), limit=limit, task_manager=known
                )
            except (OSError, ValueError) as error:  # also what datasets raises without a network
                reason = (str(error).strip() or type(error).__name__).split("\n")[0]
                raise UserError(f"cannot run {', '.join(tasks)}: {reason}") from error
            results[name] = _task_results(output)
    return results


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """The index of tasks to use. The own ones of the harness are read only if needed."""
    if include_path is not None:
        own = _read_tasks(str(include_path), False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    known = _read_tasks(str(include_path) if include_path is not None else None, True)
    unknown = [task for task in tasks if not known.match_tasks([task])]
    if unknown:
        raise UserError(
            f"no task {', '.join(unknown)} in lm-evaluation-harness: see `lm-eval ls tasks`"
        )
    return known


@cache
def _read_tasks(include_path: str | None, defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)


def _task_results(output: Mapping[str, Any]) -> dict[str, TaskResult]:
    results = {}
    for task, values in output["results"].items():
        metrics = {
            key.split(",")[0]: float(value)
            for key, value in values.items()
            if isinstance(value, int | float) and "," in key and math.isfinite(value)
        }
        better = output.get("higher_is_better", {}).get(task) or {}
        results[task] = TaskResult(metrics, {k: v for k, v in better.items() if v is not None})
    return results


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
