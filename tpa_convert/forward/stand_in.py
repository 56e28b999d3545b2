"""Forward passes in which some modules do something else, or that end where a module is reached."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Gives modules other forward functions; undone on leaving."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, original in before.items():
            if original is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = original


def named_arguments(
    module: nn.Module, positional: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """What a layer or an attention module is called with: its hidden states, which come first, and
    everything else by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]  # without self
    named = {**dict(zip(names, positional, strict=False)), **keywords}
    return named.pop(names[0]), named


class _Reached(Exception):
    """Takes what a module was called with out of a forward pass."""


def arguments_at(module: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, dict[str, Any]]:
    """Runs up to `module`, and returns what it would be called with, as `named_arguments` has it.

    Raises:
        RuntimeError: `run` never calls the module.
    """

    def stop(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        raise _Reached(*named_arguments(module, positional, keywords))

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _Reached as reached:
        hidden, keywords = reached.args
        return hidden, keywords
    finally:
        hook.remove()
    raise RuntimeError(f"{type(module).__name__} is not called")
