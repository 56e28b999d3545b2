"""Coding components: the reference is that of the coded cache, and its gradients are right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpa_convert import kernels
from tpa_convert.kernels import (
    CodeTables,
    Tier,
    encode,
    encode_rows,
    row_tables,
    straight_through,
)
from tpa_convert.modeling import tpa_codes as cache
from tpa_convert.modeling import tpa_kernels

from .encode_cases import double, random_components, random_tables


def as_quantiser(tables: CodeTables) -> cache.Quantiser:
    bits = (2 * tables.reach + 1).log2().round().int().tolist()
    layout = cache.RowLayout(tuple((b, 1) for b in bits))
    return cache.Quantiser(layout, *tables[:4], cache.highest_codes(layout))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 70),
    classes=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_those_of_the_cache(rows, width, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    tables = random_tables(width, classes, generator)
    x = random_components(rows, tables, generator)
    quantiser, exact = as_quantiser(tables), double(tables)
    # Of scales that are equally good, rounding errors decide: in fp64 there are none such.
    theirs = cache.choose_header(x.double(), as_quantiser(exact))
    assert torch.equal(encode(x.double(), exact)[0], theirs)
    header, codes = encode(x, tables)
    layout = quantiser.layout
    where = row_tables([Tier(*t) for t in layout.tiers], layout.header, layout.row_bytes)
    packed, _ = encode_rows(x, tables, where)
    assert torch.equal(cache.pack_rows(codes, header, layout), packed)
    scaled, label = straight_through(x, tables)
    numbers, kind = cache.decode(packed, quantiser)
    assert torch.equal(label, kind.long())
    assert torch.equal(scaled, numbers)
    theirs = cache.encode(x, quantiser)
    same = theirs[:, layout.header] == header
    assert torch.equal(packed[same], theirs[same])
    assert (~same).sum() <= 1
    if rows * width > 200:  # control
        assert not torch.equal(encode(x + 9 * tables.step, tables)[1], codes)


def learned(x: Tensor, tables: CodeTables) -> Tensor:
    """Components with learned step size quantisation (arXiv 1902.08153), for autograd."""
    with torch.no_grad():
        header, codes = encode(x, tables)
        scale, label = cache.scale_of(header, as_quantiser(tables))
        level = codes - tables.reach
    u = (x.float() - tables.mean[label]) / (scale * tables.step)
    inside = u.detach().abs() <= tables.reach + 0.5
    passed = torch.where(inside, u - u.detach(), 0)
    return tables.mean[label] + scale * tables.step * (level + passed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_cache(dtype) -> None:
    """Of components as the cache has them and, once the mean is added, of steps and means."""
    generator = torch.Generator().manual_seed(3)
    tables = random_tables(24, 2, generator)
    x = random_components(50, tables, generator).to(dtype)
    weight = torch.randn(50, 24, generator=generator)
    found, truth = [], []
    for gradients, ours in ((found, True), (truth, False)):
        y, mean, step = (t.clone().requires_grad_() for t in (x, tables.mean, tables.step))
        changed = tables._replace(mean=mean, step=step)
        if ours:
            scaled, label = straight_through(y.unflatten(0, (5, 10)), changed)
            numbers = (mean[label] + scaled).flatten(0, 1)
        else:
            numbers = learned(y, changed)
        (numbers * weight).sum().backward()
        gradients += [y.grad, mean.grad, step.grad]
    y = x.clone().requires_grad_()
    (cache.straight_through(y.float(), as_quantiser(tables))[0] * weight).sum().backward()
    found, truth = [*found, found[0]], [*truth, y.grad]
    for ours, theirs in zip(found, truth, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        assert (ours.float() - theirs.float()).norm() < tolerance * theirs.float().norm()
    # What is clipped, and nothing else, passes no gradient on; there is some of both.
    scale, label = cache.scale_of(encode(x, tables)[0], as_quantiser(tables))
    beyond = ((x.float() - tables.mean[label]) / (scale * tables.step)).abs() / (tables.reach + 0.5)
    clipped, inside = beyond > 1.001, beyond < 0.999
    assert clipped.any()
    assert inside.any()
    assert (found[0][clipped] == 0).all()
    assert (found[0][inside] != 0).all()


def test_it_compiles_in_one_graph_with_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = random_tables(24, 2, generator)
    x = random_components(50, tables, generator)

    def loss(x):
        scaled, label = straight_through(x, tables)
        return (tables.mean[label] + scaled).square().sum()

    gradients = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        y = x.clone().requires_grad_()
        call(y).backward()
        gradients.append(y.grad)
    assert torch.equal(*gradients)


def test_kernels_of_another_interface_are_not_taken(monkeypatch) -> None:
    """An export has its own copy of what calls them, and finds whatever package is installed."""
    found = [
        getattr(tpa_kernels, f"find_{what}") for what in ("kernel", "coding", "coded", "rotation")
    ]
    assert all(find() is not None for find in found)
    monkeypatch.setattr(kernels, "INTERFACE", kernels.INTERFACE + 1)
    assert all(find() is None for find in found)
