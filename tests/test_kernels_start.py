"""Kernels that are launched past Triton's look-up: the same ones, with the same arguments.

No GPU is needed: kernels are looked up as on an H100, and neither compiled nor run.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tpa_convert.kernels import launch, launch_encode, launch_latent
from tpa_convert.kernels import start as starting
from tpa_convert.kernels.encode_reference import row_tables
from tpa_convert.kernels.start import Constants, start_kernel

from .compiled import HOPPER
from .encode_cases import random_components, random_tables
from .kernel_cases import random_layout
from .latent_cases import random_case


class Driver:
    """Of one H100 that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return HOPPER


class Found(CompiledKernel):
    """Stands for what Triton would compile for a key; keeps what it is run with."""

    def __init__(self, key):
        self.key, self.module, self.ran = key, None, []
        self.name, self.src, self.function, self.packed_metadata = key, None, None, ()
        self._run = lambda *arguments: self.ran.append(arguments)

    def _init_handles(self) -> None:
        pass


@contextmanager
def looked_up(*kernels: Any) -> Iterator[dict[str, Found]]:
    """Every one of these kernels that is looked up, by Triton's own key."""
    found: dict[str, Found] = {}

    def compile_kernel(self, key, *_, **__):
        kernel = self.device_caches[0][0][key] = found[key] = Found(key)
        return kernel

    before = driver._active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Driver())
        patch.setattr(JITFunction, "_do_compile", compile_kernel)
        for kernel in kernels:
            patch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        yield found
    assert driver._active is before


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Grids and streams, and arguments behind what is for hooks; tensors or their addresses."""
    a, b = ((*run[:4], *map(address_of, run[9:])) for run in (a, b))
    return len(a) == len(b) and all(x is y or x == y for x, y in zip(a, b, strict=True))


def address_of(x: Any) -> Any:
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


numbers = torch.zeros(64, dtype=torch.float16)
tensors = st.sampled_from([None, numbers, numbers[1:], numbers.float(), numbers.view(torch.int16)])
integers = st.sampled_from([1, 2, 15, 16, 48, 2**31 - 1, 2**31, 2**31 + 5, 2**33])
others = st.sampled_from([None, 1, 16, 0.5])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(tensors, tensors, tensors, integers, integers, others), min_size=2))
def test_kernels_are_those_that_triton_looks_up(calls) -> None:
    """The first time and later, with the arguments that Triton hands over itself."""
    kernel, grid = launch.join_kernel, (2, 3, 4)
    constants = Constants(torch.device("cpu"), {"num_warps": 4}, CHUNK=16, SPLITS=4, OVERLAP=False)
    with looked_up(kernel):
        for call in calls:
            theirs = kernel[grid](*call, **constants.named)
            start_kernel(kernel, grid, constants, call)
            assert same(*theirs.ran)
            assert same((*theirs.ran[0][:9], *call, *constants.values), theirs.ran[1])
            theirs.ran.clear()


def test_a_kind_that_is_overlooked_would_be_seen(monkeypatch) -> None:
    """Control: one kernel for all arguments."""
    monkeypatch.setattr(starting, "kinds_of", lambda arguments: ((), [], ()))
    kernel, grid = launch.join_kernel, (1, 1, 1)
    constants = Constants(torch.device("cpu"), {"num_warps": 4}, CHUNK=16, SPLITS=4, OVERLAP=False)
    with looked_up(kernel) as found:
        for width in (16, 17):
            start_kernel(kernel, grid, constants, (numbers, numbers, numbers, 3, width, 4))
    assert len(found) == 1


@pytest.mark.parametrize("coded", [False, True])
def test_launches_name_constants_in_the_order_of_their_kernels(monkeypatch, coded) -> None:
    started = []
    for module in (launch, launch_encode, launch_latent):
        monkeypatch.setattr(module, "start_kernel", lambda *given: started.append(given))
        monkeypatch.setattr(module, "overlapped", lambda device: True, raising=False)
    query, cache = torch.zeros(1, 4, 1, 16), torch.zeros(1, 1, 100, 16)
    launch.launch_rotated(query, cache, cache, 0.3, None, None, None, None)
    codes = [[(4, 8), (2, 8)]], [(4, 16)]
    case = random_case(shape=(4, 2, 16), slots=64, codes=codes, dtype=torch.float32)
    launch_latent.launch_latent(*case.call(), 0.3, None, None, None, None)
    generator = torch.Generator().manual_seed(0)
    layout, row_bytes = random_layout([(4, 16)], 2, generator)
    tables = random_tables(16, 2, generator)
    where = row_tables(layout.tiers, layout.header, row_bytes)
    launch_encode.launch_rows(random_components(3, tables, generator), tables, where)
    assert len(started) == 6
    for kernel, _, constants, arguments in started:
        constant = kernel.arg_names[len(arguments) :]
        assert list(constants.named)[: len(constant)] == constant
        assert len(constants.values) == len(constant)
        assert not set(constants.named) & set(kernel.arg_names[: len(arguments)])
