"""What the library shows of its progress, whoever draws it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Track(Protocol):
    """Shows progress over items, and how many `tokens` a second it makes if an item has some."""

    def __call__(
        self, items: Iterable[Any], description: str, *, tokens: int = 0
    ) -> Iterable[Any]: ...


def no_tracking(items: Iterable[Any], description: str, *, tokens: int = 0) -> Iterable[Any]:
    """Iterates without showing progress."""
    return items


class Stages:
    """Seconds that the stages of a run took, by name, in the order in which they began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts what is done inside of this."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
