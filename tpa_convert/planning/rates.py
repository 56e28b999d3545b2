"""What the device at hand does in a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from tpa_convert.plans.speed import H100, Rates

SIDE = 8192  # of the matrices whose product is timed


def device_rates(device: torch.device) -> Rates:
    """Measured on a GPU, in a second; on a CPU, those of an H100, which plans are made for."""
    if device.type != "cuda":
        return H100
    return Rates(device_name(device), copy_bandwidth(device), matrix_rate(device))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: torch.mul(source, 2, out=target), device)


def matrix_rate(device: torch.device) -> float:
    """Operations a second of a large bf16 product of random matrices."""
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * SIDE**3 / _seconds(lambda: a @ b, device)


def device_name(device: torch.device) -> str:
    """Of a GPU, or how many threads a CPU computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(7):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
