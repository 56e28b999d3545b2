"""Numbers that may be written in more than one way."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def from_percent(value: Any) -> Any:
    """0.125 for the text `12.5%`; whatever else it is comes back as it is."""
    if isinstance(value, str) and value.endswith("%"):
        try:
            return float(value.removesuffix("%")) / 100
        except ValueError:
            pass
    return value


PERCENT = BeforeValidator(from_percent)
Share = Annotated[float, PERCENT]
"""A share of something, which may be given in percent."""
