"""The kernels in Gluon against the fp64 truth, on a GPU that can run it."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from tpa_convert.kernels import launch_hopper as hopper
from tpa_convert.kernels import launch_latent as launches
from tpa_convert.kernels import launch_latent_shape as shapes
from tpa_convert.kernels import start as starting
from tpa_convert.kernels.latent import latent_weights_kernel
from tpa_convert.kernels.latent_places import BYTES, WORD
from tpa_convert.kernels.latent_sums import latent_sums_kernel

from .kernel_cases import error
from .latent_cases import random_case

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
BLOCK = [(4, 20), (3, 12), (2, 60), (1, 30)]
VALUES = [(8, 4), (4, 100), (2, 60), (1, 20)]
LAYERS = {
    "8 of 128": ((32, 8, 128), [BLOCK, BLOCK[:3], [(4, 32), (2, 64), (1, 32)], BLOCK[1:]]),
    "8 of 64": ((32, 8, 64), [BLOCK, BLOCK * 2]),
    "3 of 64": ((9, 3, 64), [BLOCK]),
    "32 of 128": ((32, 32, 128), [BLOCK[1:3]] * 16),
    "8 of 96": ((24, 8, 96), [BLOCK] * 3),
    "8 of 96, 4 blocks": ((24, 8, 96), [BLOCK] * 4),
    "32 of 96": ((32, 32, 96), [BLOCK[1:3]] * 16),
}


@pytest.fixture
def used(monkeypatch):
    """Whether both kernels in Gluon were launched, and not those that they stand for, where four
    programs are enough for them."""
    monkeypatch.setattr(shapes, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(hopper, "SUM_BLOCKS", 1)
    found = []
    start = starting.Calls.start

    def noted(together, *given):
        found.extend(call.kernel for call in together.calls)
        start(together, *given)

    shapes.latent_shape.cache_clear()
    monkeypatch.setattr(starting.Calls, "start", noted)
    both = hopper.weights_kernel(), hopper.sums_kernel()
    kinds = {*both, latent_weights_kernel, latent_sums_kernel}

    def ours_alone(weights=both[0]) -> bool:
        seen = kinds & set(found)
        found.clear()
        return seen == {weights, both[1]}

    yield ours_alone
    shapes.latent_shape.cache_clear()


def made(layer: str, **others):
    shape, keys = LAYERS[layer]
    settings = {"codes": (keys, VALUES), "slots": 700, "dtype": torch.bfloat16, "device": "cuda"}
    return random_case(shape=shape, **settings | others)


def call_of(case, tables=None, softcap=None, masked=False, window=None):
    """What is launched for a case, whose bounds may be given as a mask."""
    bounds, mask = (case.start, case.end), None
    if masked:
        slot = torch.arange(case.keys.shape[2], device="cuda")
        bounds, mask = (None, None), (slot >= bounds[0][:, None]) & (slot < bounds[1][:, None])
    return *case.call()[:5], tables or case.tables, 0.3, *bounds, window, softcap, mask


def in_numbers(tables, rounded=False):
    """Tables whose weights do not come in whole numbers, or come of those."""
    weight = tables.weight
    if rounded:
        whole = tables.whole.float() * tables.unit[tables.chunks[:-1]].repeat(1, 1, 2)[..., None]
        weight = 16 * whole.unflatten(-1, (-1, WORD))[..., list(BYTES)].flatten(-2)
    return tables._replace(weight=weight.to(tables.weight.dtype), whole=None, unit=None)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weights_in_16_bits(used, layer, dtype) -> None:
    case = made(layer, dtype=dtype)
    found = launches.launch_latent(*call_of(case, in_numbers(case.tables)))
    assert error(found, case.truth(scale=0.3)) < TOLERANCE[dtype]
    assert used()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_whole_numbers_give_what_they_stand_for(used, layer, dtype) -> None:
    """And that is near the truth."""
    case = made(layer, dtype=dtype)
    found = launches.launch_latent(*call_of(case))
    same = launches.launch_latent(*call_of(case, in_numbers(case.tables, rounded=True)))
    assert used()
    assert error(found, same) < TOLERANCE[dtype]
    assert error(found, case.truth(scale=0.3)) < 2e-2


@pytest.mark.parametrize("layer", ["8 of 128", "3 of 64"])
@pytest.mark.parametrize("processors", [4, 100])
def test_sums_behind_weights_in_triton(used, monkeypatch, layer, processors) -> None:
    """In blocks of 64 slots, and of 32."""
    monkeypatch.setattr(shapes, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(hopper, "enough_tiles", lambda *_: False)
    case = made(layer, slots=1100)
    found = launches.launch_latent(*call_of(case))
    assert error(found, case.truth(scale=0.3)) < TOLERANCE[torch.bfloat16]
    assert used(latent_weights_kernel)


@pytest.mark.parametrize(("softcap", "slots"), [(None, 700), (3.0, 513), (None, 1100)])
def test_bounds_as_masks(used, softcap, slots) -> None:
    case = made("8 of 128", slots=slots)
    found = launches.launch_latent(*call_of(case, softcap=softcap, masked=True))
    assert error(found, case.truth(scale=0.3, softcap=softcap)) < TOLERANCE[torch.bfloat16]
    assert used()


def test_whatever_stands_where_nothing_attends_to(used) -> None:
    case = made("8 of 128", slots=700)
    nothing = torch.full_like(case.cosine, float("nan"))
    slot = torch.arange(700, device="cuda")
    inside = (slot >= case.start[:, None]) & (slot < case.end[:, None])
    cosine, sine = (torch.where(inside[..., None], x, nothing) for x in (case.cosine, case.sine))
    found = launches.launch_latent(*call_of(case._replace(cosine=cosine, sine=sine)))
    assert error(found, case.truth(scale=0.3)) < TOLERANCE[torch.bfloat16]
    assert used()


@pytest.mark.parametrize(
    ("layer", "positions", "window", "softcap", "slots"),
    [
        ("8 of 128", 1, 300, None, 900),
        ("8 of 128", 1, None, 3.0, 513),
        ("3 of 64", 3, None, None, 700),
        ("3 of 64", 3, 400, 3.0, 1000),
    ],
)
def test_windows_soft_caps_and_positions(used, layer, positions, window, softcap, slots) -> None:
    case = made(layer, positions=positions, slots=slots)
    found = launches.launch_latent(*call_of(case, softcap=softcap, window=window))
    truth = case.truth(scale=0.3, window=window, softcap=softcap)
    assert error(found, truth) < TOLERANCE[torch.bfloat16]
    assert used()


def test_sequences_that_begin_at_any_word(used) -> None:
    case = made("8 of 64", slots=701, codes=(LAYERS["8 of 64"][1], VALUES[:2]))
    assert case.keys.stride(0) % 16  # where copies begin
    assert case.values.stride(0) % 16
    found = launches.launch_latent(*call_of(case))
    assert error(found, case.truth(scale=0.3)) < TOLERANCE[torch.bfloat16]
    assert used()


def test_a_sequence_without_slots(used) -> None:
    case = made("8 of 128")
    start = torch.tensor([0, 500], device="cuda")
    end = torch.tensor([700, 500], device="cuda")
    found = launches.launch_latent(*case.call(), 0.3, start, end, 200, None)
    truth = case.truth(scale=0.3, start=start, end=end, window=200)
    assert error(found[:1], truth[:1]) < TOLERANCE[torch.bfloat16]
    assert found[1].count_nonzero() == 0


@pytest.mark.parametrize("added", [False, True])
def test_masks_that_leave_whole_tiles_out(used, added) -> None:
    case = made("8 of 128", slots=1100)
    kept = torch.zeros(2, 1100, dtype=torch.bool, device="cuda")
    kept[0, 300:420] = kept[1, 5] = kept[1, 1000:] = True
    mask = torch.where(kept, 0.0, torch.finfo(torch.bfloat16).min).bfloat16() if added else kept
    found = launches.launch_latent(*case.call(), 0.3, None, None, None, None, mask)
    every = torch.zeros(2, dtype=torch.long, device="cuda")
    truth = case.truth(scale=0.3, start=every, end=every + 1100, mask=kept)
    assert error(found, truth) < TOLERANCE[torch.bfloat16]
    assert used()


@pytest.mark.parametrize("table", ["items", "weight", "whole", "unit", "offset", "behind"])
def test_everything_matters(used, table) -> None:
    """Control: with another table, the result is another."""
    case = made("8 of 128", dtype=torch.float16)
    if table == "weight":
        case = case._replace(tables=in_numbers(case.tables))
    wrong = getattr(case.tables, table).clone()
    if table == "behind":
        wrong[0] += 1  # as many chunks in all
    else:
        wrong = wrong.roll(1, -1)
    tables = case.tables._replace(**{table: wrong})
    found = launches.launch_latent(*call_of(case, tables))
    assert not error(found, case.truth(scale=0.3)) < 2e-2
    assert used()
