"""Names of torch types, as options and records spell them, and whether a type holds its numbers."""

from __future__ import annotations

import torch


def named_dtype(name: str) -> torch.dtype:
    """torch.bfloat16 for "bfloat16"."""
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """The inverse of `named_dtype`."""
    return str(dtype).removeprefix("torch.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    # Minimum and maximum carry NaN along and need no temporary tensor of the same size.
    bounds = torch.aminmax(tensor.detach()) if tensor.is_floating_point() and tensor.numel() else ()
    return all(bool(torch.isfinite(bound)) for bound in bounds)
