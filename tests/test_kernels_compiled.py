"""The kernels for coded latent keys, compiled for an H100 that is not there.

What a GPU would run is looked at, not run: that it compiles, fits, and takes nothing from registers
that an assembler may overwrite (see `kernels/latent.py`).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tpa_convert.kernels import launch_latent as launches

from .compiled import Launches, matrix_products
from .latent_cases import random_case

KERNELS = ("latent_weights_kernel", "latent_sums_kernel", "latent_join_kernel")
SHARED_BYTES = 227 * 1024
CODES = [[(8, 4), (4, 30), (3, 20), (2, 60), (1, 40)]], [(4, 100), (2, 60), (1, 20)]
CASES = {
    "coded": {"shape": (9, 3, 64), "codes": CODES},
    "normalised": {"shape": (8, 2, 128), "codes": CODES, "norm": "head"},
}


@pytest.mark.parametrize(
    ("case", "shape", "added"),
    [
        ("coded", launches.SHAPES[0], False),
        ("coded", launches.SHAPES[1], True),
        ("normalised", launches.SHAPES[0], False),
    ],
)
def test_compiles_for_hopper(monkeypatch, case, shape, added) -> None:
    launched = {name: Launches(getattr(launches, name)) for name in KERNELS}
    for name, launch in launched.items():
        monkeypatch.setattr(launches, name, launch)
    monkeypatch.setattr(launches, "overlapped", lambda device: True)
    monkeypatch.setattr(launches, "SHAPES", (shape,))
    made = random_case(slots=512, dtype=torch.bfloat16, **CASES[case])
    mask = torch.ones(2, 512, dtype=torch.bfloat16 if added else torch.bool)
    launches.launch_latent(*made.call(), 0.3, None, made.end, 40, None, mask)
    for name, launch in launched.items():
        kernel = launch.compile()
        products = matrix_products(kernel.asm["ptx"])
        assert products["registers"] == 0
        assert kernel.metadata.shared <= SHARED_BYTES
        if name == "latent_weights_kernel":
            assert products["shared"]  # the keys are rebuilt by the asynchronous unit


@pytest.mark.parametrize(
    ("positions", "added", "window", "softcap"),
    [(1, None, None, None), (3, False, 400, 3.0), (1, True, 400, None)],
)
def test_warps_that_differ_compile_for_hopper(
    monkeypatch, positions, added, window, softcap
) -> None:
    """In Triton's newest release here; the oldest is that of the GPU tests."""
    launched = Launches(launches.hopper_kernel())
    monkeypatch.setattr(launches, "hopper_kernel", lambda: launched)
    monkeypatch.setattr(launches, "hopper_stages", lambda *_: 3)
    monkeypatch.setattr(launches, "overlapped", lambda device: True)
    for name in KERNELS:
        monkeypatch.setattr(launches, name, Launches(getattr(launches, name)))
    launches.latent_shape.cache_clear()
    codes = [CODES[0][0]] * 4, CODES[1]
    made = random_case(
        shape=(32, 8, 128), codes=codes, slots=512, positions=positions, dtype=torch.bfloat16
    )
    mask = None
    if added is not None:
        mask = torch.ones(2, 512, dtype=torch.bfloat16 if added else torch.bool)
    launches.launch_latent(*made.call(), 0.3, None, made.end, window, softcap, mask)
    launches.latent_shape.cache_clear()
    kernel = launched.compile()
    products = matrix_products(kernel.asm["ptx"])
    assert products["registers"] == 0
    assert products["shared"]
    assert kernel.metadata.shared <= SHARED_BYTES


@pytest.mark.parametrize(("heads", "start", "window"), [(32, False, None), (8, True, 400)])
def test_sums_by_warps_compile_for_hopper(monkeypatch, heads, start, window) -> None:
    """Nothing goes through shared memory."""
    launched = Launches(launches.hopper_sums_kernel())
    monkeypatch.setattr(launches, "hopper_sums_kernel", lambda: launched)
    monkeypatch.setattr(launches, "hopper_sums", lambda device: True)
    monkeypatch.setattr(launches, "overlapped", lambda device: True)
    for name in KERNELS:
        monkeypatch.setattr(launches, name, Launches(getattr(launches, name)))
    launches.latent_shape.cache_clear()
    codes = [CODES[0][0]] * 4, CODES[1]
    made = random_case(shape=(heads, 8, 128), codes=codes, slots=512, dtype=torch.bfloat16)
    first = made.start if start else None
    launches.launch_latent(*made.call(), 0.3, first, made.end, window, None)
    launches.latent_shape.cache_clear()
    kernel = launched.compile()
    assert matrix_products(kernel.asm["ptx"])["synchronous"]
    assert kernel.metadata.shared == 0


def test_a_left_side_from_registers_would_be_seen() -> None:
    """Control: the two forms of the instruction."""
    accumulators = "{%f1, %f2}"
    shared = f"wgmma.mma_async.sync.aligned.m64n8k16 {accumulators}, %rd1, %rd2, 1, 1, 1, 0;"
    registers = f"wgmma.mma_async.sync.aligned.m64n8k16 {accumulators}, {{%r1, %r2}}, %rd2, 1, 1;"
    assert matrix_products(shared)["registers"] == 0
    assert matrix_products(shared + registers) == {"registers": 1, "shared": 1, "synchronous": 0}
