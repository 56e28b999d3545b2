"""Settings as the benchmarks take them on the command line."""

from __future__ import annotations

import json
from typing import Any


def given_settings(text: str) -> dict[str, Any]:
    """`steps=300,learning_rate=1e-4` as keyword arguments."""
    values = dict(pair.split("=") for pair in text.split(",") if pair)
    # JSON, because YAML takes 1e-4 for text.
    return {name: json.loads(value) for name, value in values.items()}
