"""How a Triton kernel is launched for the second time: past what works out how it was compiled.

Triton finds a compiled kernel by the names, types, values and alignments of some fifty arguments
and a text of all options, again at every launch: with two or three launches a layer and token that
takes the host longer than the kernels take a GPU. A launch here gives all that is constant as one
object, which keeps what Triton has compiled for it, by what else Triton compiles anew for. What
Triton returns of a launch, and that this can be called with all arguments, is its own interface
(as in its tutorial on fused softmax).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

LARGEST = 2**31 - 1  # larger integers are passed in 64 bits


class Constants:
    """Constant arguments and options of one kernel.

    Args:
        device: that it runs on.
        options: `num_warps` and its like.
        arguments: by name, in the order in which they end the kernel's arguments.
    """

    def __init__(self, device: torch.device, options: dict[str, Any], **arguments: Any):
        self.device = device
        self.named = {**arguments, **options}
        self.values = tuple(arguments.values())
        self.compiled: dict[Any, Any] = {}


def start_kernel(
    kernel: Any, grid: tuple[int, int, int], constants: Constants, arguments: tuple[Any, ...]
) -> None:
    """Launches `kernel[grid](*arguments, **constants)`.

    Args:
        arguments: all that are not constant, in the order of the kernel: tensors, numbers and None.
    """
    if constants.device.type == "cuda" and constants.device.index != torch.cuda.current_device():
        with torch.cuda.device(constants.device):
            return _start(kernel, grid, constants, arguments)
    return _start(kernel, grid, constants, arguments)


def _start(
    kernel: Any, grid: tuple[int, int, int], constants: Constants, arguments: tuple[Any, ...]
) -> None:
    key = id(kernel), kinds_of(arguments)
    compiled = constants.compiled.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *constants.values)
        return
    made = kernel[grid](*arguments, **constants.named)
    if isinstance(made, CompiledKernel):  # the interpreter makes none
        constants.compiled[key] = made


def kinds_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton may compile a kernel anew for, of arguments that are not constant.

    Of integers whether they are 1, multiples of 16 and longer than 32 bits; of tensors their type
    and whether they begin at a multiple of 16 bytes; of others their type.
    """
    kinds: list[Any] = []
    for x in arguments:  # in one loop, since every launch waits for it
        kind = type(x)
        if kind is int:
            long = not -LARGEST <= x <= LARGEST
            kinds.append(4 if x == 1 else (x & 15 == 0) + 2 * long)
        elif kind is Tensor or isinstance(x, Tensor):
            kinds.append(x.dtype)
            kinds.append(x.data_ptr() & 15 == 0)
        else:
            kinds.append(kind)
    return tuple(kinds)
