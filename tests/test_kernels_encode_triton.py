"""The encoding kernel against the fp64 truth, on a GPU or under Triton's interpreter.

Headers and codes may differ from the truth on edges alone: where two choices are equally good.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernel_device import DEVICE
from tpa_convert.kernels import (
    RowTables,
    code_prompt,
    encode,
    encode_rows,
    rotate,
    row_codes,
    row_tables,
    straight_through,
    token_tables,
)
from tpa_convert.kernels.encode_reference import CodeTables, encode_components, pack

from .encode_cases import (
    distance,
    double,
    random_components,
    random_tables,
    size_and_label,
    weighted_error,
)
from .kernel_cases import random_layout

EDGE = 1e-3
some = settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # the interpreter is too slow to shrink
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    monkeypatch.setenv("TPA_CONVERT_BACKEND", "triton")


def case(rows, width, classes, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    tables = random_tables(width, classes, generator)
    x = random_components(rows, tables, generator)
    tables = CodeTables(*(t.to(DEVICE) for t in tables[:5]))
    return x.to(DEVICE, dtype), tables


@some
@given(
    rows=st.integers(0, 70),
    width=st.sampled_from([1, 7, 16, 100, 257, 1500, 4096]),
    classes=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_headers_and_codes(rows, width, classes, seed, dtype):
    rows = min(rows, 5) if width > 300 else rows
    x, tables = case(rows, width, classes, seed, dtype)
    header, codes = encode(x, tables)
    assert header.dtype == codes.dtype == torch.uint8
    assert codes.shape == x.shape
    truth = encode_components(x.double(), double(tables))
    size, label = size_and_label(header, tables)
    assert (distance(x, label, tables) <= distance(x, truth.label, tables) * (1 + EDGE)).all()
    same = label == truth.label
    errors = [weighted_error(x, h, tables) for h in (header, truth.header)]
    # Neighbours of the scales that are tried differ where a root mean square is on an edge.
    assert (errors[0] <= errors[1] * 1.2 + 1e-12)[same].all()
    assert ((header == truth.header) | ~same).float().mean() > 0.9 or rows < 20
    exact = ((x.double() - tables.mean[label]) / size + tables.reach).clamp_min(0)
    exact = exact.minimum(2 * tables.reach.double())
    assert ((codes - exact).abs() <= 0.5 + EDGE * (1 + exact.abs())).all()


@some
@given(
    rows=st.integers(1, 70),
    width=st.sampled_from([1, 9, 100]),
    classes=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_straight_through_agrees_with_what_is_cached(rows, width, classes, seed, dtype):
    x, tables = case(rows, width, classes, seed, dtype)
    header, codes = encode(x, tables)
    size, label = size_and_label(header, tables)
    y = x.clone().requires_grad_()
    scaled, kind = straight_through(y, tables)
    assert scaled.dtype == dtype
    assert torch.equal(kind, label)
    expected = size * (codes.double() - tables.reach)
    assert torch.allclose(scaled.double(), expected, rtol=1e-2 if dtype != torch.float32 else 1e-5)
    scaled.float().sum().backward()
    u = (x.double() - tables.mean[label]) / size
    margin, edge = EDGE * (1 + u.abs()), tables.reach + 0.5
    assert (y.grad[u.abs() < edge - margin] == 1).all()
    assert (y.grad[u.abs() > edge + margin] == 0).all()


@some
@given(
    rows=st.integers(1, 40),
    groups=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 60)), min_size=1, max_size=3),
    classes=st.sampled_from([1, 2]),
    align=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 2**31),
)
def test_rows_of_bytes_hold_the_codes(rows, groups, classes, align, seed):
    generator = torch.Generator().manual_seed(seed)
    layout, row_bytes = random_layout(groups, classes, generator, align)
    where = row_tables(layout.tiers, layout.header, row_bytes)
    x, tables = case(rows, layout.width, classes, seed, torch.float32)
    bits = torch.cat([torch.full((count,), float(b)) for b, count in groups]).to(DEVICE)
    tables = tables._replace(reach=(torch.exp2(bits) - 1) / 2)
    header, codes = encode(x, tables)
    there = RowTables(*(t.to(DEVICE) for t in where[:3]), where.header)
    packed, said = encode_rows(x, tables, there)
    assert torch.equal(packed.cpu(), pack(codes.cpu(), header.cpu(), where))
    scaled, label = straight_through(x, tables)
    behind = torch.zeros(len(x), said.shape[1] - layout.width - 1, device=DEVICE)
    assert torch.equal(said, torch.cat((scaled, label[:, None].to(x.dtype), behind), 1))
    assert said.shape[1] % 8 == 0
    assert behind.shape[1] < 8


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_prompt_is_coded_as_its_parts_are(batch, predicted) -> None:
    """Queries as they are rotated by themselves, rows and what they say as without queries."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for groups in ([(4, 30), (1, 9)], [(4, 20), (2, 11)]):
        layout, row_bytes = random_layout(groups, 2, generator)
        where = row_tables(layout.tiers, layout.header, row_bytes)
        where = RowTables(*(t.to(DEVICE) for t in where[:3]), where.header)
        parts.append((*case(7 * batch, layout.width, 2, len(parts), torch.float32), where))
    query = torch.randn(batch, 7, 3, 20, generator=generator).to(DEVICE)
    angle = torch.randn(batch, 1, 7, 20, generator=generator).to(DEVICE)
    table = angle.cos(), angle.sin()
    (key, *of_keys), (value, *of_values) = parts
    key_rows, key_features = encode_rows(key, *of_keys)
    prediction = torch.randn(31, key_features.shape[1], generator=generator).to(DEVICE)
    prediction = prediction if predicted else None
    taken_off = key_features @ prediction.T if predicted else 0
    value_rows, value_features = encode_rows(value - taken_off, *of_values)
    codes = row_codes(*of_keys), row_codes(*of_values)
    tables = token_tables(*codes, prediction)
    found = code_prompt(key, value.clone(), query, tables, *table)
    assert torch.equal(found.query.transpose(1, 2), rotate(query.transpose(1, 2), *table))
    assert torch.equal(found.keys.view(-1, found.keys.shape[-1]), key_rows)
    differing = (found.values.view(-1, found.values.shape[-1]) != value_rows).float().mean()
    assert differing <= (0.02 if predicted else 0)  # sums in another order: codes on edges
    of_values, of_keys = found.features.split((value_features.shape[1], key_features.shape[1]), 1)
    assert torch.equal(of_keys, key_features)
    assert (of_values != value_features).float().mean() <= (0.02 if predicted else 0)
    sizes = ((batch, 1, 12, rows.shape[-1]) for rows in (found.keys, found.values))
    room = [torch.full(size, 7, dtype=torch.uint8, device=DEVICE) for size in sizes]
    again = code_prompt(key, value.clone(), query, tables, *table, (*room, 3))
    assert torch.equal(again.features, found.features)
    for whole, rows in zip(room, (found.keys, found.values), strict=True):
        assert torch.equal(whole[:, :, 3:10], rows)
        assert (whole[:, :, :3] == 7).all()
        assert (whole[:, :, 10:] == 7).all()
    other = token_tables(*codes, None if predicted else torch.ones(31, key_features.shape[1]))
    other = other._replace(prediction=None if predicted else other.prediction.to(DEVICE))
    control = code_prompt(key, value.clone(), query, other, *table)
    assert (control.values != found.values).float().mean() > 0.1


def test_rows_inside_a_wider_tensor() -> None:
    x, tables = case(33, 48, 2, 0, torch.float32)
    wide = torch.full((33, 100), torch.nan, device=DEVICE)
    wide[:, 20:68] = x
    for found, truth in zip(encode(wide[:, 20:68], tables), encode(x, tables), strict=True):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("field", ["mean", "step", "spread", "importance", "reach"])
def test_every_table_matters(field) -> None:
    x, tables = case(60, 48, 2, 0, torch.float32)
    changed = tables._replace(**{field: getattr(tables, field).flip(-1).contiguous()})
    results = encode(x, tables), encode(x, changed)
    assert any(not torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_ties_go_to_even_codes_as_in_pytorch() -> None:
    """Zeros, under a mean of zero: u + reach is k + 1/2."""
    tables = random_tables(8, 1, torch.Generator().manual_seed(0))
    tables = CodeTables(*(t.to(DEVICE) for t in tables._replace(mean=torch.zeros(1, 8))[:5]))
    x = torch.zeros(3, 8, device=DEVICE)
    assert torch.equal(encode(x, tables)[1], encode_components(x, tables).codes)
