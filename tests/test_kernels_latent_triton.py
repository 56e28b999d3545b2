"""The kernel for latent keys against the fp64 truth, on a GPU or under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_kernels_interpreter.py runs this without a GPU", allow_module_level=True)

from tpa_convert.kernels.latent_reference import LatentKeys, decode_latent  # noqa: E402
from tpa_convert.kernels.launch_latent import launch_latent  # noqa: E402

from .kernel_cases import bounds, error, poison  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
some = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # the interpreter is too slow to shrink
    suppress_health_check=[HealthCheck.too_slow],
)


def case(shape, slots, width_k, width_v, positions, normed, tables, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    heads, groups, head_dim = shape

    def random(*size):
        return torch.randn(*size, generator=generator)

    start, end = bounds(2, slots, generator)
    end = torch.maximum(end, start + positions)
    angle = 3 * random(tables, slots, head_dim // 2)
    latent = LatentKeys(
        random(groups, head_dim, width_k) / width_k**0.5,
        random(groups, head_dim),
        angle.cos(),
        angle.sin(),
        random(head_dim).abs() + 0.5 if normed else None,
        random(head_dim) if normed else None,
        1e-6,
    )
    latent = LatentKeys(
        *(x.to(DEVICE, dtype) for x in latent[:4]),
        *(x if x is None else x.to(DEVICE) for x in latent[4:6]),
        latent.epsilon,
    )
    query = random(2, heads, positions, head_dim).to(DEVICE, dtype)
    keys, values = (
        poison(random(2, 1, slots, width), start, end).to(DEVICE, dtype)
        for width in (width_k, width_v)
    )
    return query, keys, values, latent, start.to(DEVICE), end.to(DEVICE)


def double(latent: LatentKeys) -> LatentKeys:
    tensors = (x if x is None else x.double() for x in latent[:6])
    return LatentKeys(*tensors, latent.epsilon)


@some
@given(
    shape=st.sampled_from([(4, 2, 16), (9, 3, 32), (6, 6, 24), (5, 1, 8)]),
    slots=st.integers(5, 200),
    width_k=st.integers(1, 18).map(lambda n: 8 * n),
    width_v=st.integers(1, 18).map(lambda n: 8 * n),
    positions=st.integers(1, 2),
    normed=st.booleans(),
    tables=st.sampled_from([1, 2]),
    window=st.sampled_from([None, 40]),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
)
def test_latent(
    shape, slots, width_k, width_v, positions, normed, tables, window, softcap, seed, dtype
):
    query, keys, values, latent, start, end = case(
        shape, slots, width_k, width_v, positions, normed, tables, seed, dtype
    )
    output = launch_latent(query, keys, values, latent, 0.3, start, end, window, softcap)
    truth = decode_latent(
        query.double(),
        keys,
        values,
        double(latent),
        scale=0.3,
        start=start,
        end=end,
        window=window,
        softcap=softcap,
    )
    assert error(output, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("field", ["weight", "offset", "cosine", "sine", "unscale", "gain"])
def test_everything_matters(field) -> None:
    query, keys, values, latent, start, end = case((4, 2, 16), 60, 24, 16, 1, True, 1, 0, DTYPES[0])
    changed = latent._replace(**{field: 2 * getattr(latent, field)})
    settings = {"scale": 0.3, "start": start, "end": end}
    output = launch_latent(query, keys, values, changed, 0.3, start, end, None, None)
    truth = decode_latent(query.double(), keys, values, double(latent), **settings)
    assert error(output, truth) > 2 * TOLERANCE[DTYPES[0]]


def test_masked() -> None:
    query, keys, values, latent, _, _ = case((4, 2, 16), 150, 24, 16, 1, False, 1, 0, DTYPES[0])
    keys, values = keys.nan_to_num(), values.nan_to_num()
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(0)).to(DEVICE) > 0.5
    keys, values = (torch.where(mask[:, None, :, None], x, torch.nan) for x in (keys, values))
    output = launch_latent(query, keys, values, latent, 0.3, None, None, None, None, mask)
    truth = decode_latent(query.double(), keys, values, double(latent), scale=0.3, mask=mask)
    assert error(output, truth) < TOLERANCE[DTYPES[0]]
