"""Kernels compiled for a GPU that is not there, as their launches would have them compiled."""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")


class Launches:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any):
        self.kernel, self.arg_names = kernel, kernel.arg_names
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **named: self.calls.append((arguments, named))

    def compile(self, target: GPUTarget = HOPPER) -> Any:
        """The kernel of the last launch."""
        arguments, named = self.calls[-1]
        options = {name: named[name] for name in OPTIONS if name in named}
        names = self.kernel.arg_names
        given = dict(zip(names, arguments, strict=False)) | {
            name: value for name, value in named.items() if name not in OPTIONS
        }
        constants: dict[Any, Any] = {}
        signature: dict[str, str] = {}
        hints: dict[Any, Any] = {}
        for i, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[(i,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                hints[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[parameter.name] = "i32"
                if value == 1 and not parameter.do_not_specialize:
                    signature[parameter.name] = "constexpr"
                    constants[(i,)] = 1
                elif value % 16 == 0 and not parameter.do_not_specialize:
                    hints[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32"
        kind = GluonASTSource if isinstance(self.kernel, GluonJITFunction) else ASTSource
        source = kind(fn=self.kernel, signature=signature, constexprs=constants, attrs=hints)
        return triton.compile(source, target=target, options=options)


def matrix_products(ptx: str) -> dict[str, int]:
    """How many asynchronous products take their left side from registers and from shared memory,
    and how many products are synchronous."""
    asynchronous = re.findall(r"wgmma\.mma_async[^;]*;", ptx)
    registers = sum(len(re.findall(r"\{", call)) > 1 for call in asynchronous)
    return {
        "registers": registers,
        "shared": len(asynchronous) - registers,
        "synchronous": len(re.findall(r"\bmma\.sync", ptx)),
    }


def overwritten_left_sides(assembly: str) -> list[str]:
    """Instructions of Hopper that write registers which an asynchronous product may still read.

    Args:
        assembly: with one instruction a line; products in flight end in the order of groups, each
            of which ends where some of them are waited for.
    """
    groups: list[set[int]] = []
    group: set[int] = set()
    found = []
    for line in assembly.splitlines():
        instruction = re.search(r"(?:@!?\w+\s+)?([A-Z][A-Z0-9]+)((?:\.\w+)*)\s+(.*)", line)
        if instruction is None:
            continue
        name, kind, operands = instruction.groups()
        if name == "HGMMA":
            left = re.match(r"R\d+, R(\d+)", operands)
            group |= set(range(int(left[1]), int(left[1]) + 4)) if left else set()
        elif name == "WARPGROUP" and kind.startswith(".DEPBAR"):
            if group:
                groups.append(group)
                group = set()
            waiting = re.search(r"gsb0, 0x(\d+)", operands)
            count = int(waiting[1]) if waiting else 0
            groups = groups[len(groups) - count :] if count < len(groups) else groups
        elif written := re.match(r"(?:U?P\w+, )?R(\d+)\b", operands):
            wide = 4 if ".128" in kind else 2 if ".64" in kind or ".WIDE" in kind else 1
            first = int(written[1])
            if group.union(*groups).intersection(range(first, first + wide)):
                found.append(line)
    return found
