"""A model whose parts are in memory only while somebody uses them.

A part is a module whose tensors can be read: a decoder layer, an embedding, a norm, a head. It
reads them when it is called, or while it is held, and lets go of them after. So a model of any size
runs in little more memory than its largest part, and what runs it need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PART = "on_demand"  # the attribute of a module that is read on demand


class Part:
    """The tensors of one module, read for as long as somebody holds it.

    Args:
        module: its parameters lie on the meta device.
        read: gives them, by their names in the module.
        device: where they are wanted.
    """

    def __init__(
        self, module: nn.Module, read: Callable[[], dict[str, Tensor]], device: torch.device
    ):
        self.module, self.device, self._read = module, device, read
        self._absent = module.state_dict(keep_vars=True)
        self._holders = 0
        self._has_read = False

    def hold(self) -> None:
        absent = any(tensor.is_meta for tensor in self.module.state_dict().values())
        if self._holders == 0 and absent:  # else a module around it is held
            self._has_read = True
            state = {name: tensor.to(self.device) for name, tensor in self._read().items()}
            self.module.load_state_dict(state, assign=True)
            self.module.requires_grad_(False)
        self._holders += 1

    def let_go(self) -> None:
        self._holders -= 1
        if self._holders == 0 and self._has_read:
            self._has_read = False
            self.module.load_state_dict(self._absent, assign=True)


def read_on_demand(
    module: nn.Module,
    read: Callable[[], dict[str, Tensor]],
    device: torch.device,
    *,
    when_called: bool = True,
) -> None:
    """Makes a module a `Part`.

    Args:
        read, device: as `Part` has them.
        when_called: whether it is held while its `forward` runs. A part inside of another need not.
    """
    setattr(module, _PART, Part(module, read, device))
    if not when_called:
        return

    def forward(*positional: Any, **keywords: Any) -> Any:
        with held(module):
            return type(module).forward(module, *positional, **keywords)

    vars(module)["forward"] = forward


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """The tensors of a module are there inside of this, whether it is read on demand or not."""
    part = getattr(module, _PART, None)
    if part is None:
        yield
        return
    part.hold()
    try:
        yield
    finally:
        part.let_go()


@contextmanager
def in_memory(model: nn.Module) -> Iterator[None]:
    """All of a model is there inside of this."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(held(module))
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; parts that are not in memory are nowhere."""
    for module in model.modules():
        if (part := getattr(module, _PART, None)) is not None:
            return part.device
    return next(model.parameters()).device
