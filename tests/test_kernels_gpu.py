"""What only a GPU shows: half precision in the matrix unit, CUDA graphs, `torch.compile`."""

from __future__ import annotations

import pytest
import torch

from tpa_convert.kernels import CodeTables, decode_attention, decode_latent, straight_through
from tpa_convert.kernels import reference as truth_of

from .encode_cases import random_components, random_tables
from .kernel_cases import bounds, error, poison
from .latent_cases import random_case

pytestmark = pytest.mark.gpu


def cache(batch, slots, width_k, width_v, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        torch.randn(batch, 1, slots, width, generator=generator) for width in (width_k, width_v)
    )
    start, end = bounds(batch, slots, generator)
    keys, values = (poison(x, start, end).to("cuda", dtype) for x in (keys, values))
    return keys, values, start.cuda(), end.cuda()


@pytest.mark.parametrize("heads", [9, 32, 40])
@pytest.mark.parametrize("widths", [(128, 128), (256, 256), (512, 512), (72, 136)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotated_in_half_precision(heads, widths, dtype) -> None:
    keys, values, start, end = cache(3, 5000, *widths, dtype)
    query = torch.randn(3, heads, 1, widths[0], device="cuda", dtype=dtype)
    settings = {"scale": 0.1, "start": start, "end": end}
    output = decode_attention(query, keys, values, **settings)
    truth = truth_of.decode_attention(query.double(), keys, values, **settings)
    assert error(output, truth) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("rank", [1, 2])
def test_contextual(rank) -> None:
    generator = torch.Generator().manual_seed(rank)
    start, end = bounds(2, 3000, generator)
    parts = []
    for _ in range(2):
        packed = torch.randn(2, 1, 3000, rank * 8 + rank * 128, generator=generator)
        packed = poison(packed, start, end).to("cuda", torch.bfloat16)
        parts.append(packed.split((rank * 8, rank * 128), -1))
    (key_heads, keys), (value_heads, values) = parts
    query = torch.randn(2, 32, 1, rank * 128, device="cuda", dtype=torch.bfloat16)
    settings = {"scale": 0.1, "start": start.cuda(), "end": end.cuda(), "groups": 8}
    settings |= {"key_heads": key_heads, "value_heads": value_heads}
    output = decode_attention(query, keys, values, **settings)
    truth = truth_of.decode_attention(query.double(), keys, values, **settings)
    assert error(output, truth) < 1e-2


LLAMA = {
    "shape": (32, 8, 128),
    "codes": ([[(8, 4), (4, 30), (3, 20), (2, 60), (1, 40)]] * 4, [(4, 100), (3, 60), (2, 300)]),
}
LATENT = {
    "llama 8b": LLAMA,
    "normalised": LLAMA | {"norm": "head"},
    "smollm2": {
        "shape": (9, 3, 64),
        "codes": ([[(4, 40), (3, 20), (2, 60), (1, 20)]], [(4, 90), (2, 60)]),
    },
    "all heads normalised": {
        "shape": (16, 16, 128),
        "codes": ([[(2, 60)]] * 16, [(2, 700)]),
        "norm": "all",
    },
    # What went wrong in an earlier kernel: few pairs, in several chunks of components.
    "few pairs": {"shape": (4, 1, 16), "codes": ([[(4, 100), (2, 60)]], [(2, 40)])},
}


@pytest.mark.parametrize("shape", [0, -1])
@pytest.mark.parametrize("case", LATENT)
def test_latent(monkeypatch, case, shape) -> None:
    """Every shape of a program that the launch could choose."""
    from tpa_convert.kernels import launch_latent

    monkeypatch.setattr(launch_latent, "SHAPES", (launch_latent.SHAPES[shape],))
    for dtype, most in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        made = random_case(slots=3000, batch=3, dtype=dtype, device="cuda", **LATENT[case])
        found = decode_latent(*made.call(), scale=0.1, start=made.start, end=made.end)
        assert error(found, made.truth(scale=0.1)) < most


def test_latent_again_and_again_gives_the_same() -> None:
    """No order of programs, warps or copies shows: every run is the first one, bit by bit."""
    made = random_case(slots=9000, batch=4, dtype=torch.bfloat16, device="cuda", **LLAMA)
    first = decode_latent(*made.call(), scale=0.1, start=made.start, end=made.end)
    for _ in range(50):
        again = decode_latent(*made.call(), scale=0.1, start=made.start, end=made.end)
        assert torch.equal(again, first)


def test_latent_in_one_graph_for_a_text_that_grows() -> None:
    """Captured once, replayed with other masks, in a compiled function without a graph break."""
    made = random_case(slots=2048, batch=2, dtype=torch.bfloat16, device="cuda", **LLAMA)
    mask = torch.zeros(2, 2048, dtype=torch.bool, device="cuda")
    mask[:, :10] = True

    def layer(query, keys, values):
        inputs = query, keys, values, *made.call()[3:]
        return decode_latent(*inputs, scale=0.1, mask=mask)

    layer(*made.call()[:3])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(*made.call()[:3])
    for length in (10, 900, 2048):
        mask[:, :length] = True
        graph.replay()
        truth = made.truth(scale=0.1, mask=mask, start=None, end=None)
        assert error(output, truth) < 2e-2
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(*made.call()[:3]), output)


def test_longer_latent_caches_compile_nothing() -> None:
    from tpa_convert.kernels.latent import latent_weights_kernel

    counts = []
    for slots in (20000, 20016, 20017, 33333):
        made = random_case(slots=slots, batch=1, dtype=torch.bfloat16, device="cuda", **LLAMA)
        decode_latent(*made.call(), scale=0.1)
        found = latent_weights_kernel.device_caches.values()
        counts.append(sum(len(caches[0]) for caches in found))
    assert counts[1:] == counts[:-1]


def test_one_graph_for_a_text_that_grows() -> None:
    """Captured once, replayed with other queries and ends; and nothing is compiled anew."""
    keys, values, _, _ = cache(1, 4096, 128, 128, torch.bfloat16)
    keys, values = keys.nan_to_num(), values.nan_to_num()
    query = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    end = torch.tensor([10], device="cuda")
    call = {"scale": 0.1, "end": end}
    decode_attention(query, keys, values, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode_attention(query, keys, values, **call)
    for length in (10, 900, 4096):
        query.normal_()
        end.fill_(length)
        graph.replay()
        truth = truth_of.decode_attention(query.double(), keys, values, **call)
        assert error(output, truth) < 1e-2


def test_longer_caches_compile_nothing() -> None:
    from tpa_convert.kernels.split_kv import split_kernel

    query = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)

    def compiled() -> int:
        return sum(len(caches[0]) for caches in split_kernel.device_caches.values())

    counts = []
    for slots in (1000, 1016, 1017, 2048, 33333):
        keys, values, _, _ = cache(1, slots, 128, 128, torch.bfloat16)
        decode_attention(query, keys, values, scale=0.1)
        counts.append(compiled())
    assert counts[1:] == counts[:-1]


def test_compiles_without_a_graph_break() -> None:
    keys, values, start, end = cache(2, 600, 64, 64, torch.bfloat16)
    query = torch.randn(2, 9, 1, 64, device="cuda", dtype=torch.bfloat16)

    def layer(query, keys, values):
        return 2 * decode_attention(query, keys, values, scale=0.1, start=start, end=end)

    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(query, keys, values), layer(query, keys, values))


def test_coding_compiles_without_a_graph_break_and_with_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = random_tables(100, 2, generator)
    x = random_components(500, tables, generator).cuda()
    tables = CodeTables(*(t.cuda() for t in tables[:5]))

    def loss(x):
        scaled, label = straight_through(x, tables)
        return (tables.mean[label] + scaled).square().sum()

    gradients = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        y = x.clone().requires_grad_()
        call(y).backward()
        gradients.append(y.grad)
    assert torch.allclose(*gradients)
    assert gradients[0].count_nonzero() > 1000
