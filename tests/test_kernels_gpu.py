"""What only a GPU shows: half precision in the matrix unit, CUDA graphs, `torch.compile`."""

from __future__ import annotations

import pytest
import torch

from tpa_convert.kernels import CodedRows, CodeTables, decode_attention, straight_through
from tpa_convert.kernels import reference as truth_of

from .encode_cases import random_components, random_tables
from .kernel_cases import bounds, error, exact, poison, random_layout, random_rows

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


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("heads", "width"), [(9, 192), (32, 1024)])
def test_coded(bits, heads, width) -> None:
    generator = torch.Generator().manual_seed(bits)
    layout, size = random_layout([(bits, width)], 2, generator, align=16)
    keys = random_rows(layout, size, 2, 3000, generator).cuda()
    values = random_rows(layout, size, 2, 3000, generator).cuda()
    layout = CodedRows(layout.tiers, layout.header, layout.step.cuda(), layout.mean.cuda(), -1)
    query = torch.randn(2, heads, 1, width, device="cuda", dtype=torch.bfloat16)
    start, end = (x.cuda() for x in bounds(2, 3000, generator))
    output = decode_attention(
        query,
        keys,
        values,
        scale=0.1,
        start=start,
        end=end,
        key_rows=layout,
        value_rows=layout,
    )
    numbers = [exact(layout).numbers(rows) for rows in (keys, values)]
    truth = truth_of.decode_attention(query.double(), *numbers, scale=0.1, start=start, end=end)
    assert error(output, truth) < 5e-3  # the output is in bf16


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
