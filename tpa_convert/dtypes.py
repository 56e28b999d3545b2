"""Names of torch types, as options and records spell them."""

from __future__ import annotations

import torch


def named_dtype(name: str) -> torch.dtype:
    """torch.bfloat16 for "bfloat16"."""
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """The inverse of `named_dtype`."""
    return str(dtype).removeprefix("torch.")
