"""Kernels that decode attention and code components, and the PyTorch references they agree with."""

from .backends import BACKENDS, Backend, BackendError, Case, choose_backend
from .decode import decode_attention, decode_on_kernel
from .encode import encode, encode_rows, straight_through
from .encode_reference import CodeTables, RowTables, row_tables
from .rows import CodedRows, Tier

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendError",
    "Case",
    "CodeTables",
    "CodedRows",
    "RowTables",
    "Tier",
    "choose_backend",
    "decode_attention",
    "decode_on_kernel",
    "encode",
    "encode_rows",
    "row_tables",
    "straight_through",
]
