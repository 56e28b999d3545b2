"""Decode attention of one layer: our kernels beside PyTorch's on the source's cache.

    python benchmarks/decode_attention.py [--only plain|contextual|coded|masked|host]
    python benchmarks/decode_attention.py --kernels

Every call finds its cache outside L2, and calls run in CUDA graphs. `of copy` counts the bytes of
the cache over the bandwidth of a plain copy in the same run. `--kernels` times each kernel of coded
latent keys by itself, as its launch has chosen it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from common.kernel_timing import copies_needed, copy_bandwidth, matrix_rate, seconds
from common.machine import device_name, versions
from common.random_models import coded_shape
from tpa_convert.kernels import (
    KeyMap,
    Rows,
    decode_attention,
    decode_latent,
    latent_tables,
)
from tpa_convert.kernels.launch import launch_rotated
from tpa_convert.kernels.start import Calls, start_kernel
from tpa_convert.modeling.tpa_codes import LOWEST_OCTAVE

# Names of sources: query heads, key/value heads, head dim.
SOURCES = {
    "MHA": (32, 32, 128),
    "GQA-8": (32, 8, 128),
    "MQA": (32, 1, 128),
    "GQA-8 of 64": (32, 8, 64),
    "SmolLM2": (9, 3, 64),
}
MOST_BUFFERS = 100
LONG = [(8, 32768), (1, 131072)]
SHORT = [(1, 2048)]
KERNEL_CASES = [
    (12.5, "GQA-8", 8, 32768),
    (25, "GQA-8", 8, 32768),
    (12.5, "GQA-8", 64, 2048),
    (12.5, "GQA-8", 1, 32768),
    (12.5, "GQA-8", 1, 2048),
    (12.5, "GQA-8 of 64", 16, 2048),
    (12.5, "SmolLM2", 64, 8192),
    (12.5, "MHA", 8, 4096),
]


def rotating(make: Callable[[], Tensor]) -> list[Tensor]:
    """As many of a cache as it takes for each to be cold when its turn comes."""
    first = make()
    more = min(MOST_BUFFERS, copies_needed(first.numel() * first.element_size())) - 1
    return [first, *(make() for _ in range(more))]


def source(name: str, batch: int, slots: int) -> tuple[float, int]:
    """Seconds of the fastest of PyTorch's kernels, and bytes of the cache."""
    heads, groups, width = SOURCES[name]
    query = torch.randn(batch, heads, 1, width, device="cuda", dtype=torch.bfloat16)
    caches = rotating(
        lambda: torch.randn(2, batch, groups, slots, width, device="cuda", dtype=torch.bfloat16)
    )

    def call(backend: SDPBackend, i: int) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, *caches[i], enable_gqa=groups != heads)

    backends = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    times = [seconds(partial(call, backend), len(caches)) for backend in backends]
    return min(times), caches[0].numel() * 2


def rotated(width: int, batch: int, slots: int, heads: int = 32) -> tuple[float, int]:
    query = torch.randn(batch, heads, 1, width, device="cuda", dtype=torch.bfloat16)
    caches = rotating(
        lambda: torch.randn(2, batch, 1, slots, width, device="cuda", dtype=torch.bfloat16)
    )
    time = seconds(lambda i: decode_attention(query, *caches[i], scale=0.1), len(caches))
    return time, caches[0].numel() * 2


def contextual(rank: int, batch: int, slots: int) -> tuple[float, int]:
    """Head factors of 8 heads in front of features of head dim 128, as caches pack them."""
    heads, groups, width = 32, 8, 128 * rank
    query = torch.randn(batch, heads, 1, width, device="cuda", dtype=torch.bfloat16)
    shape = (2, batch, 1, slots, rank * groups + width)
    caches = rotating(lambda: torch.randn(shape, device="cuda", dtype=torch.bfloat16))

    def call(i: int) -> Tensor:
        (key_heads, keys), (value_heads, values) = (
            part.split((rank * groups, width), -1) for part in caches[i]
        )
        factors = {"key_heads": key_heads, "value_heads": value_heads, "groups": groups}
        return decode_attention(query, keys, values, scale=0.1, **factors)

    return seconds(call, len(caches)), caches[0].numel() * 2


def coded(percent: float, source: str, batch: int, slots: int) -> tuple[float, int, float]:
    """Rows as conversions make them of a source: seconds, bytes of the cache and operations of
    rebuilding, scores and sums."""
    call, count, size, operations = coded_call(percent, source, batch, slots)
    return seconds(call, count), size, operations


def each_kernel(call: Callable[[int], object], count: int) -> list[tuple[str, float]]:
    """Names and seconds of the kernels that `call(i)`, i in range(count), launches."""
    calls: list[list[tuple[Any, ...]]] = []
    start = Calls.start

    def noted(together: Calls, *given: Any) -> None:
        calls[-1] += together.each(*given)
        start(together, *given)

    Calls.start = noted  # type: ignore[method-assign]
    try:
        for i in range(count):
            calls.append([])
            call(i)
    finally:
        Calls.start = start  # type: ignore[method-assign]
    found = []
    for k, (kernel, *_) in enumerate(calls[0]):
        time = seconds(lambda i, k=k: start_kernel(*calls[i][k]), count)  # type: ignore[misc]
        found.append((kernel.__name__, time))
    return found


def coded_call(
    percent: float, source: str, batch: int, slots: int
) -> tuple[Callable[[int], Tensor | None], int, int, float]:
    """A call of the i-th of several caches, how many there are, and what `coded` gives."""
    heads, groups, head_dim = SOURCES[source]
    shape = coded_shape(percent, groups, head_dim)
    parts = [
        Rows(
            layout.tiers,
            layout.header,
            0.05 * torch.rand(layout.components, device="cuda") + 0.02,
            LOWEST_OCTAVE,
        )
        for layout in (shape.key_layout, shape.value_layout)
    ]

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    widths = shape.key_block_widths
    width_k = sum(widths)
    weight = 0.1 * random(groups, head_dim // len(widths), width_k)
    offsets = random(groups, head_dim), random(groups, head_dim)
    tables = latent_tables(*parts, KeyMap(weight, widths, *offsets), torch.bfloat16, predicted=True)
    query = random(batch, heads, 1, head_dim)
    table = random(2, 1, slots, head_dim // 2).unbind()

    def make(part: Rows) -> Tensor:
        size = -(-(part.header + 1) // 4) * 4
        rows = torch.randint(0, 256, (batch, 1, slots, size), device="cuda", dtype=torch.uint8)
        rows[..., part.header] = rows[..., part.header] % 16 + 64  # scales from 1 to 4
        rows[..., 0, part.header] += 128  # the first token is of the second class
        return rows

    keys, values = (rotating(partial(make, part)) for part in parts)
    count = min(len(keys), len(values))

    def call(i: int) -> Tensor | None:
        return decode_latent(query, keys[i], values[i], *table, tables, scale=0.1)

    mixed = tables.place_of.shape[1]
    operations = 2 * groups * head_dim * width_k // len(widths) + 2 * heads * (head_dim + mixed)
    size = sum(x[0].numel() * x[0].element_size() for x in (keys, values))
    return call, count, size, float(operations * batch * slots)


def masked(width: int, batch: int, slots: int, used: int) -> tuple[float, int]:
    """A static cache of `slots` slots of which the mask leaves the first `used`."""
    query = torch.randn(batch, 32, 1, width, device="cuda", dtype=torch.bfloat16)
    mask = (torch.arange(slots, device="cuda") < used).expand(batch, -1)
    caches = rotating(
        lambda: torch.randn(2, batch, 1, slots, width, device="cuda", dtype=torch.bfloat16)
    )
    time = seconds(lambda i: decode_attention(query, *caches[i], scale=0.1, mask=mask), len(caches))
    return time, 2 * batch * used * width * 2


def kernel_rows() -> None:
    print("| case | source, ms | the whole call, ms | its kernels, ms |\n|---|---|---|---|")
    for percent, name, batch, slots in KERNEL_CASES:
        call, count, _, _ = coded_call(percent, name, batch, slots)
        parts = ", ".join(f"{k} {time * 1e3:.4f}" for k, time in each_kernel(call, count))
        beside, whole = source(name, batch, slots)[0], seconds(call, count)
        case = f"{percent} %, {name}, {batch} × {slots}"
        print(f"| {case} | {beside * 1e3:.4f} | {whole * 1e3:.4f} | {parts} |", flush=True)


def host_microseconds(call: Callable[[], object], calls: int = 300) -> float:
    """What the host spends on a call that the device is not waited for."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(calls):
        call()
    spent = perf_counter() - start
    torch.cuda.synchronize()
    return spent / calls * 1e6


def host_rows() -> None:
    """Short caches, so that the device is always ahead."""
    query = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    keys, values = torch.randn(2, 1, 1, 64, 128, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(1, 64, device="cuda", dtype=torch.bool)
    print("\n| call | host, µs |\n|---|---|")
    for name, call in (
        ("decode_attention", lambda: decode_attention(query, keys, values, scale=0.1)),
        ("with a mask", lambda: decode_attention(query, keys, values, scale=0.1, mask=mask)),
        ("launch alone", lambda: launch_rotated(query, keys, values, 0.1, None, None, None, None)),
        ("PyTorch's", lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True)),
    ):
        print(f"| {name} | {host_microseconds(call):.1f} |")


class Table:
    """Rows of a Markdown table, each beside a source measured at the same shape."""

    def __init__(self, bandwidth: float, rate: float):
        self.bandwidth, self.rate = bandwidth, rate
        self.sources: dict[tuple[str, int, int], float] = {}
        print("| case | batch × slots | ms | ns a token | of copy | against | ratio |")
        print("|---|---|---|---|---|---|---|")

    def row(
        self, name: str, batch: int, slots: int, time: float, size: int, against: str = ""
    ) -> None:
        ratio = f"{self.sources[against, batch, slots] / time:.2f}" if against else ""
        print(
            f"| {name} | {batch} × {slots} | {time * 1e3:.4f} | {time / batch / slots * 1e9:.3f} | "
            f"{size / time / self.bandwidth:.1%} | {against} | {ratio} |",
            flush=True,
        )

    def latent(
        self,
        name: str,
        batch: int,
        slots: int,
        found: tuple[float, int, float],
        against: str = "",
    ) -> None:
        """With the share of its time that bytes or operations alone would take."""
        time, size, operations = found
        floor = max(size / self.bandwidth, operations / self.rate)
        self.row(f"{name}, floor is {floor / time:.0%} of", batch, slots, time, size, against)

    def source(self, name: str, batch: int, slots: int) -> None:
        time, size = source(name, batch, slots)
        self.sources[name, batch, slots] = time
        self.row(f"source, {name}", batch, slots, time, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = ["plain", "coded", "contextual", "masked", "host"]
    parser.add_argument("--only", choices=choices)
    parser.add_argument("--kernels", action="store_true", help="of coded latent keys, and no more")
    arguments = parser.parse_args()
    only = arguments.only
    print(f"{device_name()}, {versions()}")
    bandwidth, rate = copy_bandwidth(), matrix_rate()
    print(f"copy {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.0f} TFLOP/s\n")
    if arguments.kernels:
        return kernel_rows()
    table = Table(bandwidth, rate)
    for batch, slots in LONG + SHORT:
        for name in ("MHA", "GQA-8", "MQA") if only in (None, "plain", "coded") else ():
            table.source(name, batch, slots)
        if only in (None, "plain"):
            for width in (128, 256, 512):
                name = f"rotated, {width}+{width}, bf16"
                table.row(name, batch, slots, *rotated(width, batch, slots), "MQA")
        if only in (None, "coded"):
            for percent, name in ((25, "GQA-8"), (12.5, "GQA-8"), (12.5, "MHA")):
                table.latent(
                    f"coded, {percent} %", batch, slots, coded(percent, name, batch, slots), name
                )
    if only in (None, "contextual"):
        for batch, slots in LONG + SHORT:
            for rank in (1, 2):
                name = f"contextual, R = {rank}, d = 128, bf16"
                table.row(name, batch, slots, *contextual(rank, batch, slots))
    if only in (None, "coded"):
        table.source("SmolLM2", 64, 8192)
        table.latent("coded, 12.5 %", 64, 8192, coded(12.5, "SmolLM2", 64, 8192), "SmolLM2")
    if only in (None, "masked"):
        for batch, slots, used in ((8, 32768, 32768), (8, 32768, 8192), (1, 131072, 2048)):
            name = f"rotated, 128+128, masked, {used} used"
            table.row(name, batch, slots, *masked(128, batch, slots, used))
        table.row("rotated, 128+128, no mask", 8, 8192, *rotated(128, 8, 8192))
    if only in (None, "host"):
        host_rows()


if __name__ == "__main__":
    main()
