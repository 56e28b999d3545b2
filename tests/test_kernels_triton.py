"""Triton kernels against the fp64 reference, on a GPU or under Triton's interpreter.

Without a GPU, `test_kernels_interpreter.py` runs this file in a process where TRITON_INTERPRET=1
was set before anything imported Triton.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernel_device import DEVICE
from tpa_convert.kernels.launch import choose_splits, launch_rotated
from tpa_convert.kernels.reference import decode_attention

from .kernel_cases import bounds, error, poison

# The interpreter takes logarithms of empty columns where GPUs do not warn.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
some = settings(
    max_examples=6,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # the interpreter is too slow to shrink
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def random_mask(slots, kind, generator):
    """Bool [2 or 1, slots] or None; some runs of slots are out."""
    if kind is None:
        return None
    mask = torch.rand(kind, slots, generator=generator) > 0.3
    mask[:, slots // 3 : slots // 2] = False
    return mask


def rotated_pair(
    heads,
    positions,
    slots,
    width_k,
    width_v,
    window,
    softcap,
    seed,
    dtype,
    scale=0.3,
    spread=1.0,
    masked=None,
):
    """Kernel's output and the truth, over a cache with poisoned slots."""
    generator = torch.Generator().manual_seed(seed)
    query = spread * torch.randn(2, heads, positions, width_k, generator=generator)
    keys = torch.randn(2, 1, slots, width_k, generator=generator)
    values = torch.randn(2, 1, slots, width_v, generator=generator)
    start, end = bounds(2, slots, generator)
    end = torch.maximum(end, start + positions)
    keys, values = poison(keys, start, end), poison(values, start, end)
    mask = random_mask(slots, masked, generator)
    if mask is not None:
        keys, values = (torch.where(mask[:, None, :, None], x, torch.nan) for x in (keys, values))
        mask = mask.to(DEVICE)
    query, keys, values, start, end = (
        x.to(DEVICE, dtype if x.is_floating_point() else None)
        for x in (query, keys, values, start, end)
    )
    output = launch_rotated(query, keys, values, scale, start, end, window, softcap, mask=mask)
    truth = decode_attention(
        query.double(),
        keys,
        values,
        scale=scale,
        start=start,
        end=end,
        window=window,
        softcap=softcap,
        mask=mask,
    )
    return output, truth


@some
@given(
    heads=st.sampled_from([1, 3, 9, 12]),
    positions=st.integers(1, 3),
    slots=st.integers(5, 400),
    width_k=st.integers(1, 18).map(lambda n: 8 * n),
    width_v=st.integers(1, 18).map(lambda n: 8 * n),
    window=st.sampled_from([None, 1, 40]),
    softcap=st.sampled_from([None, 3.0]),
    masked=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_rotated(heads, positions, slots, width_k, width_v, window, softcap, masked, seed, dtype):
    output, truth = rotated_pair(
        heads, positions, slots, width_k, width_v, window, softcap, seed, dtype, masked=masked
    )
    if truth.count_nonzero():
        assert error(output, truth) < TOLERANCE[dtype]
    else:  # a mask and a window may leave nothing
        assert output.count_nonzero() == 0


def test_long_sequences_and_extremes_of_the_softmax() -> None:
    """Scores of hundreds, where one slot takes all weight and sums would overflow."""
    output, truth = rotated_pair(3, 1, 3000, 16, 16, None, None, 0, torch.float32, 3.0, 30.0)
    assert error(output, truth) < 1e-5
    assert truth.abs().amax() > 1  # control: not a mean of many


def test_strides_are_taken_as_they_are() -> None:
    """Keys and values inside one tensor, queries of a projection."""
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn(2, 1, 70, 48, generator=generator).to(DEVICE)
    keys, values = cache[..., :16], cache[:, :, 3:67, 16:40]
    keys = keys[:, :, :64]
    query = torch.randn(2, 1, 5, 16, generator=generator).to(DEVICE).transpose(1, 2)
    output = launch_rotated(query, keys, values, 0.3, None, None, None, None)
    truth = decode_attention(query.double(), keys, values, scale=0.3)
    assert error(output, truth) < 2e-6


def test_a_sequence_without_slots_gives_zeros() -> None:
    query = torch.randn(2, 3, 1, 16, device=DEVICE)
    cache = torch.full((2, 1, 64, 16), torch.nan, device=DEVICE)
    cache[1] = 1.0
    end = torch.tensor([0, 64], device=DEVICE)
    output = launch_rotated(query, cache, cache, 1.0, None, end, None, None)
    assert output[0].count_nonzero() == 0
    assert torch.allclose(output[1], torch.ones_like(output[1]))


@some
@given(
    shape=st.sampled_from([(4, 2), (9, 3), (6, 1)]),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    positions=st.integers(1, 2),
    slots=st.integers(5, 200),
    seed=st.integers(0, 2**31),
)
def test_contextual(shape, ranks, positions, slots, seed):
    """Head factors in front of the features, as caches pack them."""
    generator = torch.Generator().manual_seed(seed)
    heads, groups = shape
    start, end = bounds(2, slots, generator)
    end = torch.maximum(end, start + positions)
    packed = []
    for rank in ranks:
        cache = torch.randn(2, 1, slots, rank * groups + 32 * rank, generator=generator)
        packed.append(poison(cache, start, end).to(DEVICE).split((rank * groups, 32 * rank), -1))
    (key_heads, keys), (value_heads, values) = packed
    query = torch.randn(2, heads, positions, 32 * ranks[0], generator=generator).to(DEVICE)
    start, end = start.to(DEVICE), end.to(DEVICE)
    factors = {"key_heads": key_heads, "value_heads": value_heads, "groups": groups}
    output = launch_rotated(query, keys, values, 0.3, start, end, None, None, **factors)
    truth = decode_attention(
        query.double(), keys, values, scale=0.3, start=start, end=end, **factors
    )
    assert error(output, truth) < 5e-6
    factors["key_heads"] = 2 * key_heads  # control
    other = decode_attention(
        query.double(), keys, values, scale=0.3, start=start, end=end, **factors
    )
    assert error(output, other) > 1e-3 or slots < 8


@some
@given(
    rank_v=st.sampled_from([0, 1]),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    slots=st.integers(5, 200),
    seed=st.integers(0, 2**31),
)
def test_factors_of_one_rank_for_any_width(rank_v, widths, slots, seed):
    """Of keys alone: the scales of normalised keys."""
    generator = torch.Generator().manual_seed(seed)
    heads, groups, (width_k, width_v) = 6, 3, (8 * width for width in widths)
    query = torch.randn(2, heads, 1, width_k, generator=generator).to(DEVICE)
    keys = torch.randn(2, 1, slots, groups + width_k, generator=generator).to(DEVICE)
    values = torch.randn(2, 1, slots, groups * rank_v + width_v, generator=generator).to(DEVICE)
    factors = {
        "key_heads": keys[..., :groups],
        "value_heads": values[..., :groups] if rank_v else None,
        "groups": groups,
    }
    keys, values = keys[..., groups:], values[..., groups * rank_v :]
    output = launch_rotated(query, keys, values, 0.3, None, None, None, None, **factors)
    truth = decode_attention(query.double(), keys, values, scale=0.3, **factors)
    assert error(output, truth) < 5e-6


@some
@given(
    page=st.sampled_from([1, 8, 48]),
    count=st.integers(1, 9),
    contextual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_pages(page, count, contextual, seed):
    """Pages of all sequences mixed in one pool; tables end in rubbish where nothing is in use."""
    generator = torch.Generator().manual_seed(seed)
    slots = page * count
    start, end = bounds(2, slots, generator)
    end = torch.maximum(end, start + 1)
    caches = [
        poison(torch.randn(2, 1, slots, 38, generator=generator), start, end).to(DEVICE)
        for _ in range(2)
    ]
    order = torch.randperm(2 * count, generator=generator)
    pages = order.argsort().view(2, count).int()
    used = torch.arange(count) * page < end[:, None]
    pages = torch.where(used, pages, 10**6).to(DEVICE)
    pools = [x.view(2 * count, 1, page, 38)[order.to(DEVICE)] for x in caches]
    (key_heads, keys), (value_heads, values) = (x.split((6, 32), -1) for x in pools)
    factors = {"key_heads": key_heads, "value_heads": value_heads, "groups": 6}
    factors = factors if contextual else {}
    query = torch.randn(2, 6, 1, 32, generator=generator).to(DEVICE)
    start, end = start.to(DEVICE), end.to(DEVICE)
    settings = (0.3, start, end, None, None)
    output = launch_rotated(query, keys, values, *settings, **factors, pages=pages)
    whole = [x.split((6, 32), -1) for x in caches]
    if contextual:
        factors |= {"key_heads": whole[0][0], "value_heads": whole[1][0]}
    truth = decode_attention(
        query.double(), whole[0][1], whole[1][1], scale=0.3, start=start, end=end, **factors
    )
    assert error(output, truth) < 5e-6


def test_splits_fill_the_device_once() -> None:
    assert choose_splits(512, 8, 132) == 16  # 128 of 132 programs at a time
    assert choose_splits(3, 1, 132) == 3
    assert choose_splits(100, 1000, 132) == 1
    assert choose_splits(64, 50, 132) == 5  # twice, programs of 13 blocks
    assert choose_splits(64, 50, 132, start=16) == 2  # once, of 32


def test_programs_beside_each_other_are_slower_but_faster_than_in_turns() -> None:
    assert choose_splits(512, 64, 132, start=8, beside=2, slowed=2 / 3) == 4  # two at a time
    assert choose_splits(512, 64, 132, start=8, beside=2, slowed=1) == 2  # one, as fast
    assert choose_splits(128, 128, 132, start=8, beside=5, slowed=1 / 3) == 5
    assert choose_splits(128, 128, 132, start=8, beside=5, slowed=1 / 3, most=4) == 4
