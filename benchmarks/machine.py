"""What a benchmark ran on, for the head of what it prints."""

from __future__ import annotations

import platform
import time

import torch
import transformers


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> str:
    """Of Python and the libraries, and the date."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}"
    )
