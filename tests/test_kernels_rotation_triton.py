"""The kernel that rotates pairs against fp64, on a GPU or under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernel_device import DEVICE
from tpa_convert.kernels import rotate
from tpa_convert.modeling import tpa_rotary
from tpa_convert.modeling.tpa_kernels import find_rotation

# One rounding of the result; of fp32 the sum of two rounded products.
TOLERANCE = {torch.float32: 4e-7, torch.float16: 6e-4, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")


def random_table(batch: int, positions: int, pairs: int, generator: torch.Generator):
    angle = 99 * torch.rand(batch, 1, positions, pairs, dtype=torch.float64, generator=generator)
    return tpa_rotary.feature_table((angle.cos(), angle.sin()))


@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 7),
    positions=st.integers(0, 40),
    pairs=st.sampled_from([1, 8, 20, 32, 64, 300]),
    shared=st.booleans(),
    by_head=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    table_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_pairs_are_rotated(
    batch, heads, positions, pairs, shared, by_head, dtype, table_dtype, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = random_table(1 if shared else batch, positions, pairs, generator)
    table = tuple(x.to(table_dtype) for x in table)
    # As projections give heads, and inside of a wider tensor.
    shape = (batch, heads, positions) if by_head else (batch, positions, heads)
    x = torch.randn(*shape, 2 * pairs + 3, generator=generator).to(dtype)[..., 1 : 2 * pairs + 1]
    x = x if by_head else x.transpose(1, 2)
    found = rotate(x.to(DEVICE), *(part.to(DEVICE) for part in table))
    truth = tpa_rotary.rotate(x.double(), tuple(part.double() for part in table))
    assert found.dtype == dtype
    size = x.double().abs().max() if x.numel() else 0
    assert ((found.cpu().double() - truth).abs() <= 2 * TOLERANCE[dtype] * size).all()
    if x.numel() > 100:  # control: other positions
        shifted = rotate(x.to(DEVICE), *(part.to(DEVICE).roll(1, -1) for part in table))
        assert ((shifted.cpu().double() - truth).abs() > 20 * TOLERANCE[dtype] * size).any()


def test_one_position_of_several_sequences() -> None:
    """Whose stride says nothing, in whatever order heads lie."""
    generator = torch.Generator().manual_seed(0)
    table, x = random_table(2, 1, 4, generator), torch.randn(2, 3, 1, 8, generator=generator)
    found = rotate(x.to(DEVICE), *(part.float().to(DEVICE) for part in table)).cpu()
    torch.testing.assert_close(found, tpa_rotary.rotate(x.double(), table).float())


def test_a_layer_takes_the_kernel_but_for_gradients(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    table = tuple(x.float().to(DEVICE) for x in random_table(1, 5, 8, generator))
    x = torch.randn(1, 2, 5, 16, generator=generator).to(DEVICE)
    rotation, calls = find_rotation(), []

    def seen(*given):
        calls.append(rotation(*given))
        return calls[-1]

    truth = tpa_rotary.rotate(x, table)
    assert not calls
    torch.testing.assert_close(tpa_rotary.rotate(x, table, seen), truth)
    assert len(calls) == 1
    x.requires_grad_()
    tpa_rotary.rotate(x, table, seen).sum().backward()
    assert x.grad is not None
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "reference")
    with torch.no_grad():
        torch.testing.assert_close(tpa_rotary.rotate(x, table, seen), truth)
    assert [found is None for found in calls] == [False, True]
