"""Attention kernels for decoding, and the PyTorch reference that they agree with."""

from .backends import BACKENDS, Backend, BackendError, Case, choose_backend
from .decode import decode_attention
from .rows import CodedRows, Tier

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendError",
    "Case",
    "CodedRows",
    "Tier",
    "choose_backend",
    "decode_attention",
]
