"""What the library shows of its progress, whoever draws it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


class Track(Protocol):
    """Shows progress over items, and how many `tokens` a second it makes if an item has some."""

    def __call__(
        self, items: Iterable[Any], description: str, *, tokens: int = 0
    ) -> Iterable[Any]: ...


def no_tracking(items: Iterable[Any], description: str, *, tokens: int = 0) -> Iterable[Any]:
    """Iterates without showing progress."""
    return items
