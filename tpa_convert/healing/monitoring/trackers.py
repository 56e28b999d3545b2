"""Logs of a run for other tools, through the Trainer's own integrations."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from tpa_convert.errors import UserError


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what cannot be logged to, before anything slow starts.

    Raises:
        UserError: its package is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"`log_to` {name} needs the package {name}: pip install {name}")


def trackers(names: Sequence[str], directory: Path) -> list[TrainerCallback]:
    """Callbacks that log to these tools; tensorboard's event files go to `directory`."""
    callbacks = []
    for name in names:
        callback = INTEGRATION_TO_CALLBACK[name]()
        if name == "tensorboard":
            callback.logging_dir = str(directory)
        callbacks.append(callback)
    return callbacks
