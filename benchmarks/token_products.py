"""Products of a few tokens with the matrices of a coded layer: our kernels beside PyTorch's.

    python benchmarks/token_products.py [--programs]

Every call finds its matrices outside L2, and calls run in CUDA graphs. `of copy` counts the bytes
of the matrices over half the bandwidth of a plain copy, which writes as much as it reads.
`--programs` times other sizes of programs too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from common.kernel_timing import copies_needed, copy_bandwidth, seconds
from common.machine import device_name, versions
from tpa_convert.kernels import launch_products as launches
from tpa_convert.kernels.start import start_kernel

DTYPE = torch.bfloat16
# Hidden size, query heads, key/value heads, head dim, components of keys and of values.
LAYERS = {
    "Llama-3.2-1B": (2048, 32, 8, 64, 352, 440),
    "Llama-3-8B": (4096, 32, 8, 128, 704, 888),
}
ROWS = 1, 4, 16, 64
OTHERS = [  # programs: rows, columns, numbers at a time, warps, stages
    launches.Program(*shape)
    for shape in (
        *((1, 4, 1024, 4, 3), (1, 8, 512, 4, 3), (1, 2, 2048, 4, 3), (1, 8, 1024, 8, 3)),
        *((16, 16, 512, 4, 3), (16, 16, 128, 4, 4), (16, 32, 128, 4, 4), (16, 16, 256, 4, 4)),
        *((32, 32, 128, 4, 4), (64, 16, 128, 4, 4), (64, 32, 64, 4, 5), (64, 32, 128, 8, 4)),
    )
]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def projections(layer: str, rows: int) -> tuple[Callable, Callable, int]:
    """Ours, PyTorch's, and bytes of the matrices."""
    width, heads, _, head_dim, key_size, value_size = LAYERS[layer]
    sizes = heads * head_dim, key_size, value_size
    count = copies_needed(2 * width * sum(sizes))
    weights = [[random(size, width) for size in sizes] for _ in range(count)]
    biases, x = [None, random(key_size), random(value_size)], random(rows, width)
    outputs = [random(rows, size) for size in sizes]
    biased = False, True, True
    launch = launches.projections_launch(x.device, DTYPE, rows, width, sizes, biased)

    def ours(i: int) -> list[Tensor]:
        start_kernel(*launch, (x, *weights[i], *biases, *outputs), (rows,))
        return outputs

    def theirs(i: int) -> list[Tensor]:
        return [linear(x, w, b) for w, b in zip(weights[i], biases, strict=True)]

    return ours, theirs, 2 * width * sum(sizes)


def output(layer: str, rows: int) -> tuple[Callable, Callable, int]:
    size, heads, _, head_dim, *_ = LAYERS[layer]
    width = heads * head_dim
    weights = [random(size, width) for _ in range(copies_needed(2 * width * size))]
    x, found = random(rows, width), random(rows, size)
    launch = launches.product_launch(x.device, DTYPE, rows, width, size, False)

    def ours(i: int) -> list[Tensor]:
        start_kernel(*launch, (x, weights[i], None, found), (rows,))
        return [found]

    return ours, lambda i: [linear(x, weights[i])], 2 * width * size


def gauge(layer: str, rows: int) -> tuple[Callable, Callable, int]:
    """Heads of features of keys and values."""
    _, heads, groups, head_dim, *widths = LAYERS[layer]
    width, shared = sum(size // 8 * 8 + 8 for size in widths), heads // groups
    count = copies_needed(2 * groups * head_dim * width)
    weights = [random(groups, head_dim, width) for _ in range(count)]
    x, offset = random(groups, rows * shared, width), random(groups, 1, head_dim)
    found = random(rows, groups, shared, head_dim)
    sizes = rows * shared, width, head_dim, True, groups, shared
    launch = launches.product_launch(x.device, DTYPE, *sizes)

    def ours(i: int) -> list[Tensor]:
        start_kernel(*launch, (x, weights[i], offset, found), (rows * shared,))
        return [found]

    def theirs(i: int) -> list[Tensor]:
        heads = torch.baddbmm(offset, x, weights[i].mT).view(groups, rows, shared, head_dim)
        return [heads.transpose(0, 1).contiguous()]

    return ours, theirs, 2 * groups * head_dim * width


def prediction(layer: str, rows: int) -> tuple[Callable, Callable, int]:
    """What values take off for features of keys."""
    *_, key_size, size = LAYERS[layer]
    width = key_size // 8 * 8 + 8
    weights = [random(size, width) for _ in range(copies_needed(2 * width * size))]
    x, value = random(rows, width), random(rows, size)
    launch = launches.product_launch(x.device, DTYPE, rows, width, size, False, taken=True)

    def ours(i: int) -> list[Tensor]:
        found = value.clone() if i < 0 else value
        start_kernel(*launch, (x, weights[i], None, found), (rows,))
        return [found]

    def theirs(i: int) -> list[Tensor]:
        found = value.clone() if i < 0 else value
        return [found.addmm_(x, weights[i].mT, alpha=-1)]

    return ours, theirs, 2 * width * size


CASES = {"projections": projections, "prediction": prediction, "gauge": gauge, "output": output}


def check(ours: Callable, theirs: Callable) -> float:
    """The largest relative difference."""
    pairs = zip(ours(-1), theirs(-1), strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--programs", action="store_true")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth() / 2
    print(f"{device_name()}, {versions()}, reads {bandwidth / 1e9:.0f} GB/s of a copy", flush=True)
    programs = launches.PROGRAMS
    for rows in ROWS:
        own = launches.program_of(rows, DTYPE, torch.device("cuda"))
        smallest = 1 if rows == 1 else 16
        others = [x for x in OTHERS if smallest <= x.rows <= max(rows, smallest) and x != own]
        for layer in LAYERS:
            for case, make in CASES.items():
                for program in (own, *(others if arguments.programs else ())):
                    # Of a gauge, whose rows are those of several heads, too.
                    launches.PROGRAMS = programs if program == own else (program,)
                    launches.product_launch.cache_clear()
                    launches.projections_launch.cache_clear()
                    try:
                        ours, theirs, size = make(layer, rows)
                        error, buffers = check(ours, theirs), copies_needed(size)
                        time, other = seconds(ours, buffers), 0.0
                        if program == own:
                            other = seconds(theirs, buffers)
                    except Exception as failure:  # the others are still wanted
                        print(
                            f"{rows:3} {layer:13} {case:12} {tuple(program)} {failure!r:.200}",
                            flush=True,
                        )
                        continue
                    beside = f"  PyTorch {other * 1e6:6.1f} µs" if other else ""
                    print(
                        f"{rows:3} {layer:13} {case:12} {tuple(program)!s:22} {time * 1e6:6.1f} µs "
                        f"{size / bandwidth / time:5.0%} of copy, error {error:.4f}{beside}",
                        flush=True,
                    )
                launches.PROGRAMS = programs


if __name__ == "__main__":
    main()
