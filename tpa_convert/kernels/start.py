"""How a Triton kernel is launched for the second time: past what works out how it was compiled.

Triton finds a compiled kernel by the names, types, values and alignments of some fifty arguments
and a text of all options, again at every launch: with two or three launches a layer and token that
takes the host longer than the kernels take a GPU. A launch here gives all that launches
have in common as one object, which keeps what Triton has compiled for it, by what else Triton
compiles anew for. Tensors are handed over as addresses, or Triton would ask the driver whose each
of them is.

What Triton returns of a launch, and what `run` of that takes, is its own interface; PyTorch's
Inductor launches kernels this way too. Triton's hooks, which profilers of kernels such as Proton
set, see the first launch only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

LARGEST = 2**31 - 1  # larger integers are passed in 64 bits


class Constants:
    """What launches of one kernel have in common: numbers, constants and options; the types of
    their tensors too, and which of them are None, which goes without saying.

    Args:
        device: that it runs on.
        options: `num_warps` and its like.
        numbers: that follow those of a single launch.
        arguments: by name, in the order in which they end the kernel's arguments.
    """

    def __init__(
        self,
        device: torch.device,
        options: dict[str, Any],
        numbers: tuple[float | None, ...] = (),
        **arguments: Any,
    ):
        self.device = device
        self.chosen = device.type == "cuda" and torch.cuda.device_count() > 1
        self.numbers = numbers
        self.named = {**arguments, **options}
        self.last = *numbers, *arguments.values()
        self.compiled: dict[Any, tuple[Any, ...]] = {}
        # The one for aligned tensors and no long numbers, where Triton asks nothing else.
        self.usual: tuple[Any, ...] | None = None


class Part(NamedTuple):
    """Where a tensor that only kernels see lies in a buffer: a view takes the host much longer.

    Attributes:
        first: byte.
        shape, dtype: of the tensor.
    """

    first: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, buffer: Tensor | None) -> Tensor:
        """The tensor in a buffer of bytes."""
        assert buffer is not None
        size = math.prod(self.shape) * self.dtype.itemsize
        return buffer[self.first : self.first + size].view(self.dtype).view(self.shape)


def start_kernel(
    kernel: Any,
    grid: tuple[int, int, int],
    constants: Constants,
    tensors: tuple[Tensor | Part | None, ...],
    numbers: tuple[int, ...],
    buffer: Tensor | None = None,
) -> None:
    """Launches `kernel[grid](*tensors, *numbers, *constants.numbers, **constants.named)`.

    Args:
        tensors: in the order of the kernel, None for those that this kind of launch has not.
        numbers: that differ from launch to launch, each 0 or more; at least one.
        buffer: that parts are of.
    """
    if constants.chosen and constants.device.index != driver.active.get_current_device():
        with torch.cuda.device(constants.device):
            return start_kernel(kernel, grid, constants, tensors, numbers, buffer)
    addresses: list[int | None] = []
    together, base = 0, 0 if buffer is None else buffer.data_ptr()
    for x in tensors:  # every launch waits for this loop
        if x is None:
            addresses.append(None)
        else:
            address = base + x.first if isinstance(x, Part) else x.data_ptr()
            addresses.append(address)
            together |= address
    usual = not together & 15 and max(numbers) <= LARGEST
    found = constants.usual if usual else None
    if found is None:
        kinds = kinds_of(addresses if together & 15 else (), numbers)
        found = constants.compiled.get(kinds)
    if found is None:
        given = [x.of(buffer) if isinstance(x, Part) else x for x in tensors]
        made = kernel[grid](*given, *numbers, *constants.numbers, **constants.named)
        if isinstance(made, CompiledKernel):  # the interpreter makes none
            found = constants.compiled[kinds] = made.run, made.function, made.packed_metadata
            of_numbers = kernel.params[len(tensors) : len(tensors) + len(numbers)]
            if usual and all(parameter.do_not_specialize for parameter in of_numbers):
                constants.usual = found
        return
    run, function, metadata = found
    stream = driver.active.get_current_stream(constants.device.index)
    hooks = None, None, None  # what they are told, before and after
    run(*grid, stream, function, metadata, *hooks, *addresses, *numbers, *constants.last)


def kinds_of(addresses: Sequence[int | None], numbers: tuple[int, ...]) -> tuple[Any, ...]:
    """What Triton may compile a kernel anew for, of arguments that differ from launch to launch.

    Of addresses whether they are multiples of 16, where not all are; of numbers whether they are 1,
    multiples of 16 and longer than 32 bits.
    """
    aligned = [None if x is None else x & 15 == 0 for x in addresses]
    kinds: list[Any] = [
        x & 15 == 0 if 1 < x <= LARGEST else (x == 1, x & 15 == 0, x > LARGEST) for x in numbers
    ]
    return (*aligned, *kinds)
