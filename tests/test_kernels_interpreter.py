"""Runs the tests of the Triton kernels under Triton's interpreter, where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = [
    Path(__file__).with_name(name)
    for name in (
        "test_kernels_triton.py",
        "test_kernels_encode_triton.py",
        "test_kernels_latent_triton.py",
        "test_kernels_rotation_triton.py",
        "test_kernels_tokens_triton.py",
        "test_kernels_model.py",
        "test_kernels_latent_model.py",
        "test_kernels_tokens_model.py",
        "test_kernels_room_model.py",
    )
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(900)
def test_kernels_under_the_interpreter() -> None:
    """All files in one process, since starting it takes as long as many of the tests."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *TESTS],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=TESTS[0].parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout  # control: they did run
