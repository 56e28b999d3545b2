"""The PyTorch truth that kernels are tested on, against definitions written out in loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_convert.kernels.backends import BACKENDS, BackendError, Case, choose_backend
from tpa_convert.kernels.reference import decode_attention

from .kernel_cases import bounds, error, exact, poison, random_layout, random_rows


def by_definition(query, keys, values, scale, start, end, window, softcap):
    """One softmax at a time, over a list of the slots that a position attends to."""
    batch, heads, positions, _ = query.shape
    output = torch.zeros(batch, heads, positions, values.shape[-1], dtype=query.dtype)
    for b in range(batch):
        for s in range(positions):
            own = int(end[b]) - positions + s
            first = int(start[b]) if window is None else max(int(start[b]), own - window + 1)
            slots = list(range(first, own + 1))
            for h in range(heads):
                scores = torch.stack([query[b, h, s] @ keys[b, 0, t] for t in slots]) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                output[b, h, s] = scores.softmax(0) @ values[b, 0, slots]
    return output


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 5),
    positions=st.integers(1, 3),
    slots=st.integers(12, 40),
    window=st.sampled_from([None, 4, 9]),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_reference_follows_the_definition(heads, positions, slots, window, softcap, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, positions, 6, generator=generator, dtype=torch.float64)
    keys = torch.randn(2, 1, slots, 6, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 1, slots, 4, generator=generator, dtype=torch.float64)
    start, end = bounds(2, slots, generator)
    truth = by_definition(query, keys, values, 0.7, start, end, window, softcap)
    found = decode_attention(
        query,
        poison(keys, start, end),
        poison(values, start, end),
        scale=0.7,
        start=start,
        end=end,
        window=window,
        softcap=softcap,
    )
    assert error(found, truth) < 1e-12
    # control: one slot more is seen
    other = decode_attention(query, keys, values, scale=0.7, start=start, end=end - 1)
    assert error(other, truth) > 1e-6


def test_head_factors_make_keys_and_values_of_every_head() -> None:
    generator = torch.Generator().manual_seed(0)
    groups, ranks, pairs, features, slots = 2, (3, 2), 4, 5, 9
    random = {"generator": generator, "dtype": torch.float64}
    query = torch.randn(1, 4, 1, 2 * ranks[0] * pairs, **random)
    keys = torch.randn(1, 1, slots, 2 * ranks[0] * pairs, **random)
    values = torch.randn(1, 1, slots, ranks[1] * features, **random)
    factors = [torch.randn(1, 1, slots, rank * groups, **random) for rank in ranks]
    found = decode_attention(
        query,
        keys,
        values,
        scale=0.7,
        key_heads=factors[0],
        value_heads=factors[1],
        groups=groups,
    )
    for head in range(4):
        scores = torch.zeros(slots, dtype=torch.float64)
        for t in range(slots):
            for part in range(2):
                for r in range(ranks[0]):
                    n = (part * ranks[0] + r) * pairs
                    product = query[0, head, 0, n : n + pairs] @ keys[0, 0, t, n : n + pairs]
                    scores[t] += 0.7 * factors[0][0, 0, t, r * groups + head // 2] * product
        weights = scores.softmax(0)
        for r in range(ranks[1]):
            part = values[0, 0, :, r * features : (r + 1) * features]
            truth = (weights * factors[1][0, 0, :, r * groups + head // 2]) @ part
            assert torch.allclose(found[0, head, 0, r * features : (r + 1) * features], truth)


def test_pages_are_read_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 1, 12, 8, generator=generator).double()
    query = torch.randn(2, 3, 1, 8, generator=generator).double()
    pages = torch.tensor([[4, 0, 2], [5, 1, 3]])
    pools = torch.empty(2, 6, 1, 4, 8).double()
    pools[:, pages.flatten()] = torch.stack((keys, values)).view(2, 6, 1, 4, 8)
    whole = decode_attention(query, keys, values, scale=0.7)
    assert torch.equal(decode_attention(query, *pools, scale=0.7, pages=pages), whole)
    other = decode_attention(query, *pools, scale=0.7, pages=pages.flip(0))
    assert error(other, whole) > 0.1


def test_nothing_to_attend_to_gives_zeros() -> None:
    cache = torch.full((1, 1, 5, 8), torch.nan)
    end = torch.tensor([0])
    output = decode_attention(torch.randn(1, 2, 1, 8), cache, cache, scale=1.0, end=end)
    assert output.count_nonzero() == 0


@settings(max_examples=25, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 37)), min_size=1, max_size=3),
    classes=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
)
def test_rows_decode_code_by_code(groups, classes, seed):
    """Every component of a row, from single bits of its bytes."""
    generator = torch.Generator().manual_seed(seed)
    layout, size = random_layout(groups, classes, generator)
    rows = random_rows(layout, size, 1, 2, generator)
    numbers = exact(layout).numbers(rows)
    codes, bits = torch.zeros(2, layout.width), torch.zeros(layout.width)
    for tier in layout.tiers:
        for i in range(tier.components):
            plane, byte = divmod(i, tier.size)
            for t in range(2):
                field = int(rows[0, 0, t, tier.offset + byte]) >> (plane * tier.bits)
                codes[t, tier.first + i] += (field & (2**tier.bits - 1)) << tier.shift
            bits[tier.first + i] += tier.bits
    for t in range(2):
        header = int(rows[0, 0, t, layout.header])
        kind, scale = divmod(header, 2**layout.scale_bits)
        scale = 2 ** (scale / 8 + layout.lowest_octave)
        truth = layout.mean[kind] + scale * layout.step * (codes[t] - (2**bits - 1) / 2)
        assert torch.allclose(numbers[0, 0, t].float(), truth, atol=1e-5)
    flipped = rows.clone()
    flipped[..., 0] ^= 1  # control: the lowest bit of the first code
    assert not torch.equal(exact(layout).numbers(flipped), numbers)


def case(**changes) -> Case:
    return Case(
        **{
            "layout": "rotated",
            "width_k": 128,
            "width_v": 128,
            "dtype": torch.bfloat16,
            "device": torch.device("cpu"),
            **changes,
        }
    )


def test_a_cpu_takes_the_reference(monkeypatch) -> None:
    monkeypatch.delenv("TPA_CONVERT_BACKEND", raising=False)
    assert choose_backend(case()) == "reference"


@pytest.mark.parametrize(
    ("name", "said"),
    [("triton", "CUDA device"), ("cutlass", "choose auto, triton or reference")],
)
def test_a_backend_that_cannot_run_says_why_in_one_line(monkeypatch, name, said) -> None:
    monkeypatch.setenv("TPA_CONVERT_BACKEND", name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("tpa_convert.kernels.backends.TRITON_MISSING", False)
    with pytest.raises(BackendError, match=said) as caught:
        choose_backend(case())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width_k": 130}, "multiples of 8"),
        ({"width_v": 16384}, "above 8192"),
        ({"dtype": torch.float64}, "float64"),
        ({"layout": "coded"}, "layout coded"),
        ({"layout": "latent", "dtype": torch.float32}, "in float32"),
        ({"layout": "latent", "span": (256, 1)}, "more than 128 rotary pairs"),
        ({"layout": "latent", "span": (64, 2)}, "a norm over more heads"),
    ],
)
def test_triton_refuses_with_a_reason(monkeypatch, changes, said) -> None:
    monkeypatch.setattr("tpa_convert.kernels.backends.TRITON_MISSING", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton = next(backend for backend in BACKENDS if backend.name == "triton")
    gpu = torch.device("cuda")
    assert triton.can_use(case(device=gpu)) is None
    assert said in triton.can_use(case(device=gpu, **changes))


def test_scale_of_a_header_is_in_eighths_of_an_octave() -> None:
    layout, size = random_layout([(2, 16)], 2, torch.Generator().manual_seed(0))
    layout.mean.zero_()
    rows = torch.zeros(1, 1, 2, size, dtype=torch.uint8)
    rows[0, 0, 1, layout.header] = 3
    one, other = layout.numbers(rows)[0, 0]
    assert torch.allclose(other / one, torch.full_like(one, 2 ** (3 / 8)))
    assert math.isclose(float(one[0] / layout.step[0]), -1.5 / 2, rel_tol=1e-6)
