"""Where tests of Triton kernels run: on a GPU, or under Triton's interpreter.

Importing this skips a module that has neither. Without a GPU, `test_kernels_interpreter.py` runs
these modules in processes where TRITON_INTERPRET=1 was set before anything imported Triton.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_kernels_interpreter.py runs this without a GPU", allow_module_level=True)
