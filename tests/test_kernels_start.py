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

from tpa_convert.kernels import (
    OutputMap,
    launch,
    launch_encode,
    launch_latent,
    launch_latent_shape,
    launch_products,
    launch_prompt,
    launch_token,
    token_tables,
)
from tpa_convert.kernels import start as starting
from tpa_convert.kernels.encode_reference import row_codes, row_tables
from tpa_convert.kernels.start import Calls, Constants, Part, start_kernel

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


zeros = torch.zeros(64, dtype=torch.float16)
TYPES = st.sampled_from([None, torch.float16, torch.float32, torch.int16])
integers = st.sampled_from([0, 1, 2, 15, 16, 48, 2**31 - 1, 2**31, 2**31 + 5, 2**33])
others = st.sampled_from([None, 1, 16, 0.5])
OPTIONS = torch.device("cpu"), {"num_warps": 4}
NAMED = {"CHUNK": 16, "SPLITS": 4, "OVERLAP": False}


@st.composite
def launches(draw: Any) -> tuple[Any, ...]:
    """Types of three tensors, and what calls have in common and have not: one number, for which
    Triton compiles nothing anew, or one more, for which it does."""
    types = draw(st.tuples(TYPES, TYPES, TYPES))
    offsets = st.tuples(*[st.sampled_from([0, 4, 16])] * 3)  # bytes
    more = [integers] * draw(st.integers(0, 1))
    calls = st.lists(st.tuples(offsets, integers, *more), min_size=2)
    return types, (*[draw(integers)] * (1 - len(more)), draw(others)), draw(calls)


@settings(max_examples=100, deadline=None)
@given(st.lists(launches(), min_size=1, max_size=3))
def test_kernels_are_those_that_triton_looks_up(cases) -> None:
    """The first time and later, with the arguments that Triton hands over itself."""
    kernel, grid = launch.join_kernel, (2, 3, 4)
    with looked_up(kernel):
        for types, fixed, calls in cases:
            constants = Constants(*OPTIONS, fixed, **NAMED)
            for offsets, *call in calls:
                tensors = tuple(
                    None if of is None else zeros.view(torch.uint8)[at:].view(of)
                    for of, at in zip(types, offsets, strict=True)
                )
                theirs = kernel[grid](*tensors, *call, *fixed, **constants.named)
                start_kernel(kernel, grid, constants, tensors, tuple(call))
                assert same(*theirs.ran)
                last = *fixed, *NAMED.values()
                assert same((*theirs.ran[0][:9], *tensors, *call, *last), theirs.ran[1])
                theirs.ran.clear()


def test_a_kind_that_is_overlooked_would_be_seen(monkeypatch) -> None:
    """Control: one kernel for all arguments."""
    monkeypatch.setattr(starting, "kinds_of", lambda addresses, numbers: ())
    kernel, grid, constants = launch.join_kernel, (1, 1, 1), Constants(*OPTIONS, (4,), **NAMED)
    with looked_up(kernel) as found:
        for width in (16, 17):
            start_kernel(kernel, grid, constants, (zeros, zeros, zeros), (3, width))
    assert len(found) == 1


def test_a_part_of_a_buffer_is_a_tensor_to_kernels() -> None:
    """To those that Triton looks up, and to those found without it."""
    kernel, grid, constants = launch.join_kernel, (1, 1, 1), Constants(*OPTIONS, (4,), **NAMED)
    buffer = torch.zeros(4096, dtype=torch.uint8)
    part = Part(256, (3, 5), torch.float16)
    with looked_up(kernel) as found:
        for _ in range(2):
            start_kernel(kernel, grid, constants, (part, zeros, zeros), (3, 16), buffer)
    tensor = part.of(buffer)
    assert tensor.shape == part.shape
    assert tensor.dtype == part.dtype
    assert tensor.data_ptr() == buffer.data_ptr() + 256
    (kernel,) = found.values()
    assert same(*kernel.ran)


@pytest.fixture(autouse=True)
def nothing_worked_out() -> Iterator[None]:
    """What is kept of launches holds kernels that are not there."""
    kept = (
        launch_latent_shape.latent_shape,
        launch_latent_shape.latent_constants,
        launch_products.product_launch,
        launch_products.projections_launch,
        launch_encode.encode_constants,
    )
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def layer(offset: int = 0) -> tuple[Any, ...]:
    """Arguments of `launch_latent`, a map for it, and arguments of `launch_token`; states of the
    token are `offset` numbers away from an aligned place."""
    generator = torch.Generator().manual_seed(0)
    shape, size, codes = (4, 2, 16), 32, ([[(4, 8), (2, 8)]], [(4, 16)])
    case = random_case(shape=shape, slots=100, batch=1, codes=codes, dtype=torch.float16)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).half()

    features = case.tables.place_of.shape[1]
    output_map = OutputMap(random(2, 16, features), random(2, 16), random(size, 64), None)
    coders = []
    for _ in range(2):
        layout, row_bytes = random_layout([(4, 16)], 2, generator)
        where = row_tables(layout.tiers, layout.header, row_bytes)
        coders.append(row_codes(random_tables(16, 2, generator), where))
    tables = token_tables(*coders, random(16, 24))
    weights = random(64, size), random(16, size), random(16, size)
    states = random(1, 1, 2 * size).flatten()[offset : offset + size].view(1, 1, size)
    table = random(1, 1, 1, 16)
    token = states, weights, (None, random(16), random(16)), tables, table, table, 16
    call = *case.call(), 0.3, None, None, None, None, None, None, True
    return call, output_map, token


KERNELS = {
    launch_latent_shape: ("latent_weights_kernel", "latent_sums_kernel", "latent_join_kernel"),
    launch_products: ("projections_kernel", "product_kernel"),
    launch_token: ("encode_kernel",),
}


@pytest.mark.parametrize("offset", [0, 1])
def test_kernels_of_one_call_are_those_that_triton_looks_up(monkeypatch, offset) -> None:
    """At every start the same, with the same arguments: the first, later ones, and those after
    which tensors lie elsewhere."""
    kernels = [getattr(module, name) for module, names in KERNELS.items() for name in names]
    buffers = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(2)]
    started, single, start = [], [], Calls.start

    def noted(self, buffer, *given) -> None:
        started.append((self, given))
        start(self, buffers[0], *given)

    monkeypatch.setattr(Calls, "start", noted)
    alone = lambda *launch: single.append(1) or start_kernel(*launch)  # noqa: E731
    monkeypatch.setattr(starting, "start_kernel", alone)
    monkeypatch.setattr(launch_latent_shape, "overlapped", lambda device: True)
    with looked_up(*kernels) as found:
        call, output_map, token = layer(offset)
        launch_latent.launch_latent(*call, output_map=output_map)
        launch_token.launch_token(*token)
        for calls, given in started:
            for buffer in buffers:
                runs = []
                for known in (False, True):
                    for kernel in found.values():
                        kernel.ran.clear()
                    if not known:
                        calls.ready = False
                        for called in calls.calls:
                            called.constants.compiled, called.constants.usual = {}, None
                    single.clear()
                    start(calls, buffer, *given)
                    one_by_one = not known or (offset and calls is started[1][0])
                    assert len(single) == (len(calls.calls) if one_by_one else 0)
                    runs.append([run for kernel in found.values() for run in kernel.ran])
                assert len(runs[0]) == len(runs[1]) == len(calls.calls)
                assert all(map(same, *runs))
    assert len(started) == 2


@pytest.mark.parametrize("coded", [False, True])
def test_launches_name_constants_in_the_order_of_their_kernels(monkeypatch, coded) -> None:
    started = []
    for module in (launch, launch_encode, launch_prompt, starting):
        monkeypatch.setattr(module, "start_kernel", lambda *given: started.append(given))
    for module in (launch, launch_latent_shape):
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
    x, coder = random_components(3, tables, generator), row_codes(tables, where)
    launch_encode.launch_rows(x, coder)
    query, table = torch.zeros(1, 3, 2, 16), torch.zeros(1, 1, 3, 16)
    launch_prompt.launch_prompt(x, x, query, token_tables(coder, coder, None), table, table)
    call, output_map, token = layer()
    launch_latent.launch_latent(*call, output_map=output_map)
    launch_token.launch_token(*token)
    assert len(started) == 6 + 2 + 5 + 4
    for kernel, _, constants, tensors, numbers, *_ in started:
        count = len(tensors) + len(numbers) + len(constants.numbers)
        constant = kernel.arg_names[count:]
        assert list(constants.named)[: len(constant)] == constant
        assert constants.last == (*constants.numbers, *map(constants.named.get, constant))
        assert not set(constants.named) & set(kernel.arg_names[:count])
