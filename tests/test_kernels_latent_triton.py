"""The kernels for coded latent keys against the fp64 truth, on a GPU or under the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernel_device import DEVICE, GPU
from tpa_convert.kernels import launch_latent as launches
from tpa_convert.kernels import launch_latent_shape
from tpa_convert.kernels.latent_places import WORD
from tpa_convert.kernels.latent_tables import PLACES
from tpa_convert.kernels.launch_latent import launch_latent

from .kernel_cases import error
from .latent_cases import random_case

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CODES = {
    "one block": ([[(4, 8), (2, 8)]], [(8, 3), (4, 5), (2, 8)]),
    "two blocks": ([[(4, 5), (3, 9), (1, 30)], [(2, 7), (1, 30)]], [(3, 21), (1, 50)]),
    "every length": ([[(bits, 3)] for bits in range(1, 5)], [(bits, 4) for bits in range(1, 9)]),
    "many": ([[(2, 70)]], [(2, 130)]),
}
some = settings(
    max_examples=50 if GPU else 8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # the interpreter is too slow to shrink
    suppress_health_check=[HealthCheck.too_slow],
)


@some
@given(
    shape=st.sampled_from([(4, 2, 16), (9, 3, 32), (6, 6, 24), (5, 1, 8), (20, 10, 16)]),
    codes=st.sampled_from([*CODES]),
    align=st.sampled_from([1, 2, 4, 16]),
    slots=st.integers(1, 200),
    positions=st.sampled_from([1, 1, 3]),
    batch=st.integers(1, 3),
    norm=st.sampled_from([None, None, "head", "all"]),
    predicted=st.booleans(),
    shared_table=st.booleans(),
    window=st.sampled_from([None, 40]),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
)
def test_latent(shape, codes, slots, positions, window, softcap, dtype, **others) -> None:
    if shape[2] // 2 % len(CODES[codes][0]):
        shape = (4, 2, 16)
    case = random_case(
        shape=shape,
        codes=CODES[codes],
        slots=max(slots, 3 * positions),
        positions=positions,
        dtype=dtype,
        device=DEVICE,
        **others,
    )
    found = launch_latent(*case.call(), 0.3, case.start, case.end, window, softcap)
    truth = case.truth(scale=0.3, window=window, softcap=softcap)
    assert found.shape == truth.shape
    assert error(found, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("align", [1, 4])
def test_two_items_are_of_one_word(codes, align) -> None:
    tables = random_case(codes=CODES[codes], align=align, slots=8).tables
    items = tables.items.view(-1, 2)
    words = items & 0xFFFF
    assert torch.equal(words[:, 0], words[:, 1])
    assert items[:, 0].unique().numel() > 1  # control
    if codes == "every length":
        assert ((items[:, 0] >> 24 > 0) & (items[:, 1] >> 24 == 0)).any()  # one was left over
    of_keys = tables.layout.key_items
    reach = [
        int(x.max() - x.min()) + 1
        for part in (tables.items[:of_keys], tables.items[of_keys:])
        for x in (part & 0xFFFF).split(PLACES // WORD)
    ]
    assert tables.layout.reach == max(reach)


@pytest.fixture(scope="module")
def case():
    return random_case(
        codes=CODES["two blocks"], slots=150, norm="head", dtype=DTYPES[0], device=DEVICE
    )


@pytest.mark.parametrize(
    "table", ["items", "weight", "offset", "norm", "place_of", "step", "chunks"]
)
def test_everything_matters(case, table) -> None:
    """Control: with another table, the result is another."""
    right = getattr(case.tables, table)
    wrong = right.clone() if right.is_floating_point() else right.roll(1, -1)
    if right.is_floating_point():
        wrong[0] *= -2
    elif table == "chunks":
        wrong = right.clamp_min(1)
    tables = case.tables._replace(**{table: wrong})
    found = launch_latent(*case.call()[:5], tables, 0.3, case.start, case.end, None, None)
    assert not error(found, case.truth(scale=0.3)) < 2 * TOLERANCE[DTYPES[0]]


@pytest.mark.parametrize("argument", range(5))
def test_every_input_matters(case, argument) -> None:
    inputs = list(case.call())
    inputs[argument] = inputs[argument].roll(1, -1)
    found = launch_latent(*inputs, 0.3, case.start, case.end, None, None)
    assert not error(found, case.truth(scale=0.3)) < 2 * TOLERANCE[DTYPES[0]]


@pytest.mark.parametrize("added", [False, True])
def test_masked(added) -> None:
    """A mask with holes and one of a single slot."""
    case = random_case(codes=CODES["one block"], slots=150, dtype=DTYPES[0], device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 150, generator=generator) > 0.5
    mask[1] = torch.arange(150) == 140
    mask = mask.to(DEVICE)
    given = mask
    if added:
        given = torch.where(mask, 0, torch.finfo(DTYPES[0]).min).to(DTYPES[0])
    found = launch_latent(*case.call(), 0.3, None, None, None, None, given)
    truth = case.truth(scale=0.3, mask=mask, start=None, end=None)
    assert error(found, truth) < TOLERANCE[DTYPES[0]]


def test_numbers_of_a_mask_are_added_to_scores() -> None:
    case = random_case(codes=CODES["one block"], slots=60, dtype=DTYPES[0], device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(2, 60, generator=generator).to(DEVICE) > 0.5
    low = torch.where(kept, 0.0, -40.0)  # as good as masked, but not the lowest number
    found = launch_latent(*case.call(), 0.3, None, None, None, None, low)
    truth = case.truth(scale=0.3, mask=kept, start=None, end=None)
    assert error(found, truth) < TOLERANCE[DTYPES[0]]


def test_rows_begin_at_words() -> None:
    case = random_case(codes=CODES["two blocks"], slots=20, device=DEVICE)
    wider = torch.nn.functional.pad(case.keys, (0, 3))
    call = case.query, wider[..., :-3], *case.call()[2:]
    with pytest.raises(ValueError, match="multiples of 4 bytes"):
        launch_latent(*call, 0.3, None, None, None, None)
    wider = torch.nn.functional.pad(case.keys, (0, 4))
    call = case.query, wider[..., :-4], *case.call()[2:]
    found = launch_latent(*call, 0.3, case.start, case.end, None, None)
    assert error(found, case.truth(scale=0.3)) < 1e-5


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_blocks_of_pairs_that_nothing_is_kept_of(empty) -> None:
    """Their keys are their offsets."""
    blocks = [[(4, 20)], [(2, 12), (1, 8)], [(8, 4)]]
    blocks[empty] = []
    case = random_case(shape=(4, 2, 24), codes=(blocks, [(4, 8)]), slots=70, device=DEVICE)
    found = launches.launch_latent(*case.call(), 0.3, case.start, case.end, None, None)
    assert error(found, case.truth(scale=0.3)) < 1e-5


def test_nothing_to_attend_to_gives_zeros() -> None:
    case = random_case(codes=CODES["one block"], slots=200, dtype=DTYPES[0], device=DEVICE)
    mask = torch.zeros(2, 200, dtype=torch.bool, device=DEVICE)
    mask[0, 7] = True
    found = launch_latent(*case.call(), 0.3, None, None, None, None, mask)
    assert found[0].count_nonzero()
    assert found[1].count_nonzero() == 0


def test_pages() -> None:
    """Slots of a pool of pages, in the order that each sequence has them."""
    whole = random_case(codes=CODES["two blocks"], slots=96, dtype=DTYPES[0], device=DEVICE)
    pages = torch.tensor([[4, 0, 2, 7, 9, 11], [5, 1, 3, 6, 8, 10]], device=DEVICE)
    pools = []
    for part in (whole.keys, whole.values):
        pool = torch.empty(12, 1, 16, part.shape[-1], dtype=part.dtype, device=DEVICE)
        pool[pages.flatten()] = part.view(12, 1, 16, part.shape[-1])
        pools.append(pool)
    inputs = whole.query, *pools, *whole.call()[3:]
    bounds = whole.start, whole.end
    found = launch_latent(*inputs, 0.3, *bounds, None, None, None, pages)
    assert error(found, whole.truth(scale=0.3)) < TOLERANCE[DTYPES[0]]
    other = launch_latent(*inputs, 0.3, *bounds, None, None, None, pages.flip(0))
    assert not error(other, whole.truth(scale=0.3)) < 0.1


@pytest.mark.parametrize("shape", launches.SHAPES)
@pytest.mark.parametrize("stages", [1, 2, 3] if GPU else [2])
def test_every_shape_of_a_program(monkeypatch, shape, stages) -> None:
    monkeypatch.setattr(launches, "SHAPES", (shape,))
    monkeypatch.setattr(launch_latent_shape, "STAGES", stages)
    case = random_case(codes=CODES["every length"], slots=300, dtype=DTYPES[0], device=DEVICE)
    found = launch_latent(*case.call(), 0.3, case.start, case.end, None, None)
    assert error(found, case.truth(scale=0.3)) < TOLERANCE[DTYPES[0]]


@pytest.mark.skipif(GPU, reason="the interpreter tells what is read")
def test_nothing_behind_the_rows_is_read(monkeypatch) -> None:
    """Not even by what is loaded ahead, where items of wider rows of values follow those of keys:
    behind a cache there may be no memory."""
    from triton.runtime import interpreter

    case = random_case(codes=([[(1, 128)]], [(4, 300)]), slots=70, dtype=torch.float32)
    size, behind = case.keys.numel(), 4096
    buffer = torch.zeros(size + behind, dtype=torch.uint8)
    keys = buffer[:size].view(case.keys.shape).copy_(case.keys)
    end, read = keys.data_ptr() + size, []

    class Watched:
        def __getattr__(self, name):
            return getattr(real, name)

        def load(self, addresses, mask, *rest):
            read.append(addresses[mask])
            return real.load(addresses, mask, *rest)

    real = interpreter._interpreter
    monkeypatch.setattr(interpreter, "_interpreter", Watched())
    launch_latent(case.query, keys, *case.call()[2:], 0.3, None, None, None, None)
    addresses = torch.cat([torch.from_numpy(x.ravel().astype("int64")) for x in read])
    assert ((addresses >= end - size) & (addresses < end)).any()  # control: rows were read
    assert not ((addresses >= end) & (addresses < end + behind)).any()
