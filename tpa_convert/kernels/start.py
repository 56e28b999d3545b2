"""How a Triton kernel is launched for the second time: past what works out how it was compiled.

Triton finds a compiled kernel by the names, types, values and alignments of some fifty arguments
and a text of all options, again at every launch: with two or three launches a layer and token that
takes the host longer than the kernels take a GPU. A launch here gives all that is constant as one
object, which keeps what Triton has compiled for it, by what else Triton compiles anew for. Tensors
are handed over as addresses, or Triton would ask the driver whose each of them is.

What Triton returns of a launch, and what `run` of that takes, is its own interface; PyTorch's
Inductor launches kernels this way too. Triton's hooks, which profilers of kernels such as Proton
set, see the first launch only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver

LARGEST = 2**31 - 1  # larger integers are passed in 64 bits


class Constants:
    """Constant arguments and options of one kernel.

    Args:
        device: that it runs on.
        options: `num_warps` and its like.
        arguments: by name, in the order in which they end the kernel's arguments.
    """

    def __init__(self, device: torch.device, options: dict[str, Any], **arguments: Any):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.named = {**arguments, **options}
        self.values = tuple(arguments.values())
        self.compiled: dict[Any, tuple[Any, ...]] = {}


def start_kernel(
    kernel: Any, grid: tuple[int, int, int], constants: Constants, arguments: tuple[Any, ...]
) -> None:
    """Launches `kernel[grid](*arguments, **constants)`.

    Args:
        arguments: all that are not constant, in the order of the kernel: tensors and perhaps None
            for some, then numbers and perhaps None for some, of which the first is a number.
    """
    if constants.on_gpu and constants.device.index != driver.active.get_current_device():
        with torch.cuda.device(constants.device):
            return _start(kernel, grid, constants, arguments)
    return _start(kernel, grid, constants, arguments)


def _start(
    kernel: Any, grid: tuple[int, int, int], constants: Constants, arguments: tuple[Any, ...]
) -> None:
    kinds, addresses, numbers = kinds_of(arguments)
    found = constants.compiled.get(kinds)
    if found is None:
        made = kernel[grid](*arguments, **constants.named)
        if isinstance(made, CompiledKernel):  # the interpreter makes none
            constants.compiled[kinds] = made.run, made.function, made.packed_metadata
        return
    run, function, metadata = found
    stream = driver.active.get_current_stream(constants.device.index)
    hooks = None, None, None  # what they are told, before and after
    run(*grid, stream, function, metadata, *hooks, *addresses, *numbers, *constants.values)


def kinds_of(arguments: tuple[Any, ...]) -> tuple[Any, list[int | None], tuple[Any, ...]]:
    """What Triton may compile a kernel anew for, of arguments that are not constant; addresses of
    the tensors; and the numbers behind them.

    Of tensors their type and whether they begin at a multiple of 16 bytes; of numbers see
    `kinds_of_numbers`.
    """
    kinds: list[Any] = []
    addresses: list[int | None] = []
    for x in arguments:  # in one loop, since every launch waits for it
        if x is None:
            kinds.append(None)
            addresses.append(None)
        elif type(x) is int or type(x) is float:
            break
        else:
            address = x.data_ptr()
            kinds.append(x.dtype)
            kinds.append(address & 15 == 0)
            addresses.append(address)
    numbers = arguments[len(addresses) :]
    return (*kinds, kinds_of_numbers(*numbers)), addresses, numbers


@functools.lru_cache(maxsize=1024, typed=True)  # all layers have the same ones
def kinds_of_numbers(*numbers: Any) -> tuple[Any, ...]:
    """Of integers whether they are 1, multiples of 16 and longer than 32 bits; of others their
    type."""
    kinds: list[Any] = []
    for x in numbers:
        if type(x) is int:
            long = not -LARGEST <= x <= LARGEST
            kinds.append(4 if x == 1 else (x & 15 == 0) + 2 * long)
        else:
            kinds.append(type(x))
    return tuple(kinds)
