"""Kernels that decode attention, code components and rotate pairs, and the PyTorch references that
they agree with."""

from .backends import BACKENDS, Backend, BackendError, Case, choose_backend, wanted
from .decode import decode_attention, decode_on_kernel
from .decode_latent import attend_on_kernel, decode_latent, latent_on_kernel, runs_latent
from .encode import encode, encode_rows, runs_components, straight_through
from .encode_reference import CodeTables, RowTables, row_codes, row_tables
from .latent_tables import KeyMap, LatentTables, OutputMap, Rows, latent_tables
from .prompts import code_prompt
from .rotation import rotate, rotate_on_kernel
from .rows import CodedRows, Tier
from .token_tables import token_tables
from .tokens import take_in, takes_in

INTERFACE = 3
"""To be raised whenever a function that exported models take from here (`modeling/tpa_kernels.py`)
takes or gives anything else: exports of another version then do without kernels."""

__all__ = [
    "BACKENDS",
    "INTERFACE",
    "Backend",
    "BackendError",
    "Case",
    "CodeTables",
    "CodedRows",
    "KeyMap",
    "LatentTables",
    "OutputMap",
    "RowTables",
    "Rows",
    "Tier",
    "attend_on_kernel",
    "choose_backend",
    "code_prompt",
    "decode_attention",
    "decode_latent",
    "decode_on_kernel",
    "encode",
    "encode_rows",
    "latent_on_kernel",
    "latent_tables",
    "rotate",
    "rotate_on_kernel",
    "row_codes",
    "row_tables",
    "runs_components",
    "runs_latent",
    "straight_through",
    "take_in",
    "takes_in",
    "token_tables",
    "wanted",
]
