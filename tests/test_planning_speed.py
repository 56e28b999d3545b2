"""Predicted times of decoding steps, and plans that are chosen by them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tpa_convert.errors import UserError
from tpa_convert.planning.rates import device_rates
from tpa_convert.planning.search import Candidate, choose
from tpa_convert.plans import Budget, plan_coded, plan_uniform
from tpa_convert.plans.cost import Cost, layer_cost, source_cost
from tpa_convert.plans.speed import H100, DecodeTime, Rates

# Llama-3-8B's attention.
SIZES: dict[str, Any] = {
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "key_norm": False,
}
CONTEXT, BATCH = 32768, 4
TIMES = DecodeTime(SIZES, CONTEXT, BATCH)
READS = Rates("a device that computes in no time", 1e12, math.inf)
COMPUTES = Rates("a device that reads in no time", math.inf, 1e14)


def test_the_source_reads_its_weights_and_its_cache() -> None:
    numbers = source_cost(SIZES, CONTEXT).parameters + BATCH * CONTEXT * 32 * 2 * 8 * 128
    assert replace(TIMES, rates=READS).of_source == pytest.approx(2 * numbers / 1e12)
    operations = BATCH * source_cost(SIZES, CONTEXT).decode_flops
    assert replace(TIMES, rates=COMPUTES).of_source == pytest.approx(operations / 1e14)
    assert TIMES.of_source == pytest.approx(2 * numbers / H100.bandwidth)  # it waits for memory


def test_a_plan_takes_the_longer_of_the_two_in_each_layer() -> None:
    narrow, latent = (
        plan_uniform(SIZES, Budget(kv_floats=1024), key_cache=kind)
        for kind in ("rotated", "latent")
    )
    both = replace(narrow, layers=[*narrow.layers[:16], *latent.layers[16:]])
    for rates in (READS, COMPUTES, H100):
        times = replace(TIMES, rates=rates)
        halves = times.of(narrow) / 2 + times.of(latent) / 2
        assert times.of(both) == pytest.approx(halves)
    assert TIMES.of(narrow) == pytest.approx(replace(TIMES, rates=READS).of(narrow) / 3)
    assert TIMES.of(latent) == pytest.approx(
        BATCH * sum(layer_cost(x, SIZES, CONTEXT).decode_flops for x in latent.layers) / 7.2e14
    )
    assert TIMES.of(narrow) < TIMES.of(latent) < TIMES.of_source


def test_codes_that_are_not_chosen_yet_count_by_their_budget() -> None:
    small, large = (plan_coded(SIZES, Budget(kv_ratio=x), key_blocks=8) for x in (0.125, 0.25))
    reads = replace(TIMES, rates=READS)
    cached = BATCH * CONTEXT * (large.kv_bytes - small.kv_bytes)
    assert reads.of(large) - reads.of(small) == pytest.approx(cached / 1e12)
    blocks = [plan_coded(SIZES, Budget(kv_ratio=0.25), key_blocks=n) for n in (1, 4)]
    computes = [replace(TIMES, rates=COMPUTES).of(plan) for plan in blocks]
    rebuilt = 2 * 1024 * 1024 * CONTEXT * 32 * BATCH / 1e14
    assert computes[0] - computes[1] == pytest.approx(0.75 * rebuilt, rel=1e-3)


def candidate(kl: float, seconds: float, budget: float = 8.0) -> Candidate:
    plan = plan_uniform(SIZES, Budget(kv_floats=256))
    cost = Cost(0, 0, 0, 0)
    return Candidate(budget, plan, "static", "uniform", None, kl, 1 + kl, cost, seconds)


def test_the_best_of_the_fastest_is_chosen() -> None:
    source = TIMES.of_source
    found = [
        candidate(0.01, 0.9 * source),
        candidate(0.03, 0.5 * source),
        candidate(0.02, 0.502 * source),  # as fast
        candidate(0.001, 0.1 * source, budget=4.0),
    ]
    assert choose(found, 8.0, 0.1) == 0  # by the loss alone
    assert choose(found, 8.0, 0.1, TIMES) == 2
    assert choose(found[:3], None, 0.1, TIMES) == 2
    assert choose(found[:3], None, 0.015, TIMES) == 0  # the only one within the accepted loss


def test_what_is_slower_than_the_source_is_not_chosen() -> None:
    found = [candidate(0.01, 1.1 * TIMES.of_source), candidate(0.01, 1.2 * TIMES.of_source)]
    assert choose(found, 8.0, 0.1) == 0
    with pytest.raises(UserError, match="no plan decodes as fast as the source at 32,768 tokens"):
        choose(found, 8.0, 0.1, TIMES)


def test_without_a_gpu_steps_are_those_of_an_h100() -> None:
    assert device_rates(torch.device("cpu")) == H100
