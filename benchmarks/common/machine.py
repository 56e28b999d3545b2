"""What a benchmark runs on, for the head of what it prints."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def main_memory() -> tuple[int, int]:
    """Bytes of main memory that this process has, and that it had at most, mapped pages included.
    Not its ru_maxrss, which is at least that of the process that started it."""
    found = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> int:
    """Makes the peak of `main_memory` what the process has now, and returns that."""
    Path("/proc/self/clear_refs").write_text("5")
    return main_memory()[0]


@contextmanager
def tf32() -> Iterator[None]:
    """Matrix products of fp32 numbers in TF32 on a GPU, which is precise enough to evaluate."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
