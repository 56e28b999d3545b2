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
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

LARGEST = 2**31 - 1  # larger integers are passed in 64 bits
ALIGNMENT = 16  # bytes: addresses that are multiples are told from others
ALIGNED = 128  # bytes that parts of a buffer begin at multiples of
NO_HOOKS = None, None, None  # what they are told, before and after


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

    def elsewhere(self) -> bool:
        """Whether another device than theirs is the current one."""
        return self.chosen and self.device.index != driver.active.get_current_device()


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


def laid_out(
    sizes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], first: int = 0
) -> tuple[dict[str, Part], int]:
    """Parts of such shapes and types behind each other, and the bytes of a buffer for all; `first`
    are taken."""
    parts = {}
    for name, (shape, dtype) in sizes.items():
        parts[name] = Part(first, shape, dtype)
        first += -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
    return parts, first


class Call(NamedTuple):
    """One of several kernels that are started together.

    Attributes:
        pick: what it takes of all that they are given.
        tensors: how many of these are.
    """

    kernel: Any
    grid: tuple[int, int, int]
    constants: Constants
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]
    tensors: int


class Calls:
    """Kernels that are started one after the other, each with what it has names for.

    Args:
        kernels: with grids, constants, and other names for some of their arguments.
        tensors, numbers: names of what differs from start to start.
        parts: of a buffer that comes with each start.
        fixed: tensors and numbers that all starts have in common.
        viewed: types that some of the tensors are read as.
    """

    def __init__(
        self,
        kernels: Sequence[tuple[Any, tuple[int, int, int], Constants, Mapping[str, str]]],
        tensors: Sequence[str],
        parts: Mapping[str, Part],
        fixed: Mapping[str, Tensor | int | None],
        numbers: Sequence[str],
        viewed: Mapping[str, torch.dtype] | None = None,
    ):
        self.viewed = {tensors.index(name): dtype for name, dtype in (viewed or {}).items()}
        self.parts, self.fixed = (*parts.values(),), (*fixed.values(),)
        names = (*tensors, *parts, *fixed, *numbers)
        assert len({*names}) == len(names), "a name for two things"
        are_numbers = {*numbers, *(name for name, x in fixed.items() if isinstance(x, int))}
        place = {name: i for i, name in enumerate(names)}
        self.calls = []
        for kernel, grid, constants, others in kernels:
            own = kernel.arg_names[: len(kernel.arg_names) - len(constants.last)]
            taken = [others.get(name, name) for name in own]
            count = sum(name not in are_numbers for name in taken)
            pick = itemgetter(*map(place.__getitem__, taken))
            self.calls.append(Call(kernel, grid, constants, pick, count))
        self.first = [part.first for part in self.parts]
        self.addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in self.fixed]
        held = [x for x in self.fixed if isinstance(x, Tensor)]
        self.aligned = all(x.data_ptr() % ALIGNMENT == 0 for x in held)
        self.ready = self.compiled()

    def start(
        self, buffer: Tensor, tensors: Sequence[Tensor | None], numbers: tuple[int, ...]
    ) -> None:
        """Launches them; what is given is in the order of its names."""
        constants = self.calls[0].constants
        if constants.elsewhere():
            with torch.cuda.device(constants.device):
                return self.start(buffer, tensors, numbers)
        if self.ready:
            base = buffer.data_ptr()
            addresses: list[int | None] = []
            together = base
            for x in tensors:
                if x is None:
                    addresses.append(None)
                else:
                    address = x.data_ptr()
                    addresses.append(address)
                    together |= address
            if together % ALIGNMENT == 0 and max(numbers) <= LARGEST:
                addresses += [base + first for first in self.first]
                given = (*addresses, *self.addresses, *numbers)
                stream = driver.active.get_current_stream(constants.device.index)
                for call in self.calls:
                    run, function, metadata = call.constants.usual  # type: ignore[misc]
                    arguments = *NO_HOOKS, *call.pick(given), *call.constants.last
                    run(*call.grid, stream, function, metadata, *arguments)
                return None
        for launch in self.each(buffer, tensors, numbers):
            start_kernel(*launch)
        self.ready = self.compiled()
        return None

    def compiled(self) -> bool:
        """Whether Triton has compiled all, for what is aligned."""
        return self.aligned and all(call.constants.usual for call in self.calls)

    def each(
        self, buffer: Tensor, tensors: Sequence[Tensor | None], numbers: tuple[int, ...]
    ) -> Iterator[tuple[Any, ...]]:
        """The same one by one, as arguments of `start_kernel`."""
        seen: list[Any] = list(tensors)
        for i, dtype in self.viewed.items():
            seen[i] = seen[i].view(dtype)
        given = (*seen, *self.parts, *self.fixed, *numbers)
        for kernel, grid, constants, pick, count in self.calls:
            arguments = pick(given)
            yield kernel, grid, constants, arguments[:count], arguments[count:], buffer


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
    if constants.elsewhere():
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
    usual = together % ALIGNMENT == 0 and max(numbers) <= LARGEST
    found = constants.usual if usual else None
    if found is None:
        kinds = kinds_of(addresses if together % ALIGNMENT else (), numbers)
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
    run(*grid, stream, function, metadata, *NO_HOOKS, *addresses, *numbers, *constants.last)


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
