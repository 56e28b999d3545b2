"""What a benchmark runs on, for the head of what it prints."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def package_versions() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def versions() -> str:
    """Of Python and the libraries, and the date."""
    named = [f"{name} {version}" for name, version in package_versions().items()]
    return ", ".join([*named, time.strftime("%Y-%m-%d")])


@contextmanager
def tf32() -> Iterator[None]:
    """Matrix products of fp32 numbers in TF32 on a GPU, which is precise enough to evaluate."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
