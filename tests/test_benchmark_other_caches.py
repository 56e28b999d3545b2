"""Caches of the source coded by other methods: what they are made of."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks import benchmark
from tests.conversions import coded_moments, random_blocks, source_of
from tests.tiny_models import MODELS
from tpa_convert.forward.comparison import agreement

# Max, "Quantizing for minimum distortion", 1960, table I
LEAST_ERROR = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("bits", LEAST_ERROR)
def test_values_for_a_gaussian_have_the_least_error(bits) -> None:
    levels = benchmark("common.other_caches").lloyd_max(bits)
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.double)

    def error(values: torch.Tensor) -> float:
        nearest = values[torch.bucketize(x, (values[1:] + values[:-1]) / 2)]
        return (x - nearest).square().mean().item()

    assert error(levels) == pytest.approx(LEAST_ERROR[bits], rel=0.02)
    assert error(levels) < min(error(1.1 * levels), error(0.9 * levels))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rotated_heads_lose_what_a_gaussian_loses(bits) -> None:
    """Whatever a head looks like, and in whatever unit it is."""
    heads = torch.zeros(500, 64, dtype=torch.double)
    generator = torch.Generator().manual_seed(1)
    heads[torch.arange(500), torch.randint(64, (500,), generator=generator)] = 7.0
    heads += 0.3 * torch.randn(500, 64, generator=generator)
    for unit in (1.0, 1e-3):
        found = benchmark("common.other_caches").rotated_codes(unit * heads, bits)
        error = (found - unit * heads).square().sum() / (unit * heads).square().sum()
        assert error.item() == pytest.approx(LEAST_ERROR[bits], rel=0.15)


def test_components_are_coded_in_the_bits_that_they_are_given() -> None:
    caches = benchmark("common.other_caches")
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.double)
    x = torch.randn(4, 5000, 24, generator=generator, dtype=torch.double) @ mix + 3.0
    flat = x.flatten(0, 1)
    mean, covariance = flat.mean(0), flat.mT.cov()
    for budget in (24, 72):
        (transform,) = caches.transforms([(mean, covariance)], budget)
        assert budget - 8 < int(transform.bits.sum()) <= budget
        found = transform(x)
        assert torch.equal(found[:, : caches.SINKS], x[:, : caches.SINKS])
        codes = (found[:, caches.SINKS :] - mean) @ transform.basis
        for component, bits in zip(codes.flatten(0, 1).mT, transform.bits, strict=True):
            assert len((component / transform.step.max()).round(decimals=9).unique()) <= 2**bits
        energy = transform.basis.mT @ covariance @ transform.basis
        share = torch.tensor([1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.0035, 0.00104, 3e-4, 9e-5])
        expected = (energy.diagonal() * share[transform.bits]).sum()
        error = (found - x)[:, caches.SINKS :].square().sum(-1).mean()
        assert error.item() == pytest.approx(expected.item(), rel=0.1)


def test_more_bits_are_nearer_to_the_source() -> None:
    model = MODELS["llama"]()
    source, moments, blocks = source_of(model), coded_moments(model), random_blocks(seed=9)
    other_cache = benchmark("common.other_caches").other_cache
    for names in (["int8", "int4", "int2"], ["rotated8", "rotated4", "rotated2"],
                  ["transform50", "transform25", "transform12.5"]):  # fmt: skip
        made = [other_cache(source, moments, name) for name in names]
        losses = [agreement(model, other, blocks).kl for other, _ in made]
        floats = [count for _, count in made]
        assert 0 < losses[0] < 0.2 * losses[1] < 0.2 * losses[2]
        assert floats[0] > floats[1] > floats[2]
    assert made[0][1] == pytest.approx(0.5 * 32, rel=0.02)
    assert agreement(model, MODELS["llama"](), blocks).kl < 1e-6  # hooks are on a copy
    with pytest.raises(SystemExit, match="pca9 is no other cache"):
        other_cache(source, moments, "pca9")
