"""Tables of coded latent keys: what kernels read in them is what components stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tpa_convert.kernels.latent_places import BYTES, LOWEST_BIT, MASK_BITS
from tpa_convert.kernels.latent_reference import rebuild
from tpa_convert.kernels.latent_tables import Rows, latent_tables

from .benchmarks import benchmark
from .kernel_cases import error, exact
from .latent_cases import LatentCase, random_case

emulation = benchmark("whole_numbers")
BLOCK = [(8, 3), (4, 30), (3, 20), (2, 40), (1, 25)]
VALUES = [(4, 20), (1, 12)]
EIGHT_BITS = 0.02  # of keys, that rounding weights may cost: codes cost ten times as much


def made(*blocks: list[tuple[int, int]]) -> LatentCase:
    codes = list(blocks), VALUES
    return random_case(shape=(8, 4, 32), codes=codes, slots=40, dtype=torch.float32)


def left_of_bytes(case: LatentCase) -> tuple[Tensor, Tensor]:
    return emulation.left_of_bytes(case.keys[:, 0], case.tables)


def keys_of(case: LatentCase, places: Tensor, weight: Tensor) -> Tensor:
    return emulation.in_blocks(places.double(), weight, case.tables)


def truth_of(case: LatentCase) -> Tensor:
    """The same of `latent_reference`, [b, t, B, spans, 2 N]."""
    layout, rows = case.coded[0], case.keys[:, 0]
    components = exact(layout).numbers(rows)
    zeros = case.key_map._replace(offset=torch.zeros_like(case.key_map.offset), of_class=None)
    keys = rebuild(components, None, zeros)  # [b, g, t, d]
    header = rows[..., layout.header].int() % 128
    scale = torch.exp2(header / 8 + layout.lowest_octave).double()
    keys = keys / scale[:, None, :, None]
    of = case.tables.layout
    keys = keys.unflatten(-1, (2, of.blocks, of.pairs))  # [b, g, t, 2, B, pairs]
    low = min(8, of.padded)
    assert of.padded == of.pairs
    keys = keys.unflatten(-1, (-1, low)).unflatten(1, (of.spans, of.heads))
    return keys.permute(0, 3, 5, 1, 4, 6, 2, 7).flatten(4)


@pytest.mark.parametrize("blocks", [(BLOCK,), (BLOCK, BLOCK[1:], BLOCK[2:4], BLOCK[::2])])
def test_places_add_up_to_keys(blocks) -> None:
    case = made(*blocks)
    left, keep = left_of_bytes(case)
    numbers = left / 8 - keep / 16
    places = numbers[..., list(BYTES)].flatten(-2)
    truth = truth_of(case)
    assert error(keys_of(case, places, case.tables.weight), truth) < 1e-5
    other = case.tables.weight.roll(1, -1)
    assert error(keys_of(case, places, other), truth) > 0.1  # control


@pytest.mark.parametrize("blocks", [(BLOCK[1:],), (BLOCK, BLOCK[1:], BLOCK[2:4], BLOCK[::2])])
def test_whole_numbers_add_up_to_keys(blocks) -> None:
    case = made(*blocks)
    tables = case.tables
    left, keep = left_of_bytes(case)
    codes = (2 * left - keep).flatten(-2)
    assert codes.abs().max() < 2**MASK_BITS
    assert tables.whole.dtype == torch.int8
    assert tables.whole.abs().max() == 127
    found = keys_of(case, codes, tables.whole) * tables.unit.repeat(1, 1, 2)
    truth = truth_of(case)
    assert error(found, truth) < EIGHT_BITS
    assert error(keys_of(case, codes, tables.whole.roll(1, -1)), truth) > 10 * EIGHT_BITS  # control


def test_larger_weights_are_of_higher_codes() -> None:
    """Within the seven bits of masks."""
    case = made(BLOCK)
    keep = case.tables.items.long() >> 24
    keep = keep[keep > 0]
    lowest = keep & -keep
    assert lowest.min() == 2**LOWEST_BIT
    assert len(lowest.unique()) > 2
    assert keep.max() < 2**MASK_BITS


@pytest.mark.parametrize(("bits", "enough"), [(1, True), (2, True), (4, True), (8, False)])
def test_when_eight_bits_are_enough(bits, enough) -> None:
    """Where rounding codes costs much more than rounding weights."""
    tables = made([(bits, 64)]).tables
    assert (tables.whole is not None) == (tables.unit is not None) == enough


def test_keys_that_are_zero_but_for_their_offsets() -> None:
    case = made(BLOCK)
    parts = [Rows(x.tiers, x.header, x.step, x.lowest_octave) for x in case.coded]
    nothing = case.key_map._replace(weight=torch.zeros_like(case.key_map.weight))
    tables = latent_tables(*parts, nothing, torch.float32, True)
    assert tables.whole is not None
    assert tables.whole.count_nonzero() == tables.weight.count_nonzero() == 0
    assert tables.unit.isfinite().all()
