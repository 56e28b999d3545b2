"""What it costs to read rows of codes and to take them apart, by bits and width.

    python benchmarks/unpack_rows.py

One kernel reads rows as attention kernels do (asynchronous copies of blocks of tokens), moves every
code into a half-precision number and folds all of them into one word by exclusive or; another folds
the words as they are. Bytes a second are relative to a plain copy in the same run.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from kernel_timing import copy_bandwidth, seconds
from machine import device_name, versions

from tpa_convert.kernels.unpack import unpack

TIERS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # bits of a code -> bits of its tiers


@triton.jit
def fold(total, a, b):
    """total ^ a ^ b, two int16 at a time."""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0x96;", "=r,r,r,r", [total, a, b], tl.int16, is_pure=True, pack=2
    )


@triton.jit
def read(
    rows,
    offset,
    totals,
    FIRST: tl.constexpr,
    WORDS: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    UNPACK: tl.constexpr,
):
    word = tl.arange(0, SIZE)[None, :]
    for first in tl.static_range(0, WORDS, SIZE):
        words = tl.load(rows + offset + (FIRST + first + word), mask=first + word < WORDS, other=0)
        if UNPACK:
            for field in tl.static_range(0, 16 // BITS, 2):
                a = unpack(words, field, BITS, True).to(tl.int16, bitcast=True)
                b = unpack(words, field + 1, BITS, True).to(tl.int16, bitcast=True)
                totals = fold(totals, a, b)
        else:
            totals = fold(totals, words, words + 1)
    return totals


@triton.jit
def rows_kernel(
    rows,
    out,
    tokens,
    stride,
    WORDS: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    UNPACK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    totals = tl.zeros([BLOCK, SIZE], tl.int16)
    for block in tl.range(program * BLOCK, tokens, programs * BLOCK, num_stages=STAGES):
        offset = (block + tl.arange(0, BLOCK)).to(tl.int64)[:, None] * stride
        totals = read(rows, offset, totals, 0, WORDS[0], SIZE, BITS[0], UNPACK)
        if len(BITS) > 1:
            totals = read(rows, offset, totals, WORDS[0], WORDS[1], SIZE, BITS[1], UNPACK)
    tl.store(out + program, tl.xor_sum(tl.xor_sum(totals.to(tl.int32), 1), 0))


def launch(
    rows: torch.Tensor,
    out: torch.Tensor,
    bits: tuple[int, ...],
    width: int,
    unpacked: bool,
    stride: int,
) -> None:
    words = tuple(width * b // 16 for b in bits)
    size = min(128, triton.next_power_of_2(max(words)))
    block = 1 << min(256, 16384 // stride).bit_length() - 1  # 32 KB of rows
    rows_kernel[(2 * 132,)](
        rows,
        out,
        rows.numel() // stride,
        stride,
        WORDS=words,
        BITS=bits,
        SIZE=size,
        BLOCK=block,
        STAGES=3,
        UNPACK=unpacked,
        num_warps=8,
        num_stages=3,
    )


def measure(
    rows: torch.Tensor,
    out: torch.Tensor,
    bits: tuple[int, ...],
    width: int,
    stride: int,
    unpacked: bool,
) -> float:
    return seconds(lambda i: launch(rows[i], out, bits, width, unpacked, stride), len(rows))


def main() -> None:
    print(f"{device_name()}, {versions()}")
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e9:.0f} GB/s\n")
    print(
        "| components | bits | bytes | read, GB/s | unpacked too, GB/s | of copy | ns | ps a code |"
    )
    print("|---|---|---|---|---|---|---|---|")
    out = torch.empty(264, dtype=torch.int32, device="cuda")
    for width in (192, 1024, 4096):
        for bits, tiers in TIERS.items():
            stride = width * bits // 16
            tokens = (128 << 20) // (2 * stride) // 2048 * 2048
            rows = torch.randint(-(2**15), 2**15, (3, tokens * stride), device="cuda").short()
            call = partial(measure, rows, out, tiers, width, stride)
            plain, unpacked = call(False), call(True)
            size = 2 * rows[0].numel()
            print(
                f"| {width} | {bits} | {2 * stride} | {size / plain / 1e9:.0f} | "
                f"{size / unpacked / 1e9:.0f} | {size / unpacked / bandwidth:.0%} | "
                f"{unpacked / tokens * 1e9:.3f} | {unpacked / tokens / width * 1e12:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
