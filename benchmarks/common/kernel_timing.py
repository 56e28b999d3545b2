"""Timing of GPU kernels in CUDA graphs, over several buffers so that no data is found in L2."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch

COLD_BYTES = 200 << 20  # four times the L2 of an H100: what other calls read between two of one


def copies_needed(bytes_read: int) -> int:
    """Buffers to rotate among so that each is cold when its turn comes."""
    return max(2, math.ceil(COLD_BYTES / bytes_read) + 1)


def seconds(call: Callable[[int], object], buffers: int, repeats: int = 15) -> float:
    """Median time of `call(i)`, i in range(buffers), in a graph of at least 20 calls."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = math.ceil(20 / buffers)
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for i in range(buffers):
                call(i)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(5 + repeats):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / (rounds * buffers) * 1e-3)
    return statistics.median(times[5:])


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes read and written a second by a large copy (a kernel: graphs copy more slowly)."""
    source = torch.randn(2, size // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda i: torch.mul(source[i], 2, out=target[i]), 2, 5)


def matrix_rate(size: int = 8192) -> float:
    """Operations a second of a large bf16 product of random matrices."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda _: a @ b, 4)
