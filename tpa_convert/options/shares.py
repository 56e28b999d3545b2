"""How much of the training tokens each text gets, as people write it: `essays.jsonl@3`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any


def split_share(spec: str) -> tuple[str, float | None]:
    """`essays.jsonl@3` -> ("essays.jsonl", 3.0); a spec without a share -> (spec, None).

    No Hub name has an @, and `name:config` and drive letters stay whole. A file name that itself
    ends in @ and a number needs a share behind it.

    Raises:
        ValueError: a share that is not positive, or too large for a float.
    """
    match = re.fullmatch(r"(.+)@(-?\d+(?:\.\d*)?(?:e[+-]?\d+)?)", spec)
    if match is None:
        return spec, None
    return match[1], _checked(match[1], float(match[2]), match[2])


def join_shares(texts: Mapping[Any, Any]) -> tuple[str, ...]:
    """{"essays.jsonl": 3} -> ("essays.jsonl@3",).

    Raises:
        ValueError: a share that is not a positive number.
    """
    for name, share in texts.items():
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise ValueError(f"the share of {name} must be a number, not {share!r}")
        _checked(name, share, share)
    return tuple(f"{name}@{share}" for name, share in texts.items())


def _checked(name: str, share: float, written: Any) -> float:
    if not 0 < share < math.inf:
        raise ValueError(f"the share of {name} must be a positive number, not {written}")
    return share
