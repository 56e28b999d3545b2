"""Matrices from features to heads, in whole words, in one product or block by block."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tpa_convert.kernels.rows import FEATURES as OF_KERNELS
from tpa_convert.modeling.tpa_coder import FEATURES
from tpa_convert.modeling.tpa_gauges import BlockGauge, HeadGauge, in_whole_words


def filled(gauge: nn.Module) -> nn.Module:
    for parameter in gauge.parameters():
        nn.init.normal_(parameter)
    return gauge.double().requires_grad_(False)


def test_kernels_and_models_have_words_of_one_length() -> None:
    assert FEATURES == OF_KERNELS


@settings(max_examples=30, deadline=None)
@given(
    heads=st.integers(1, 3),
    widths=st.sampled_from([[5], [3, 8], [7, 1], [4, 4, 9, 2]]),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_keys_of_all_blocks_in_one_product(heads, widths, batch, seed) -> None:
    """As a GPU does it: what a CPU makes block by block."""
    torch.manual_seed(seed)
    gauge = filled(BlockGauge(heads, 16, widths, 1))
    used = sum(widths) + 1
    features = torch.randn(batch, 1, 6, used, dtype=torch.float64)
    features = nn.functional.pad(features, (0, -used % FEATURES))
    at_once = gauge.shared(features, None, gauge.weight, gauge.widths)
    torch.testing.assert_close(at_once, gauge(features))
    first = gauge.shared(features, slice(0, 1), gauge.weight, gauge.widths)
    torch.testing.assert_close(first, gauge(features)[:, :1])
    other = gauge.shared(features, None, gauge.weight.roll(1, -1), gauge.widths)
    assert not torch.allclose(other, at_once) or gauge.weight.shape[-1] == 1  # control


@given(widths=st.lists(st.integers(1, 20), min_size=1, max_size=3), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_zeros_behind_each_run_say_nothing(widths, seed) -> None:
    torch.manual_seed(seed)
    gauge = filled(HeadGauge(2, 4, widths, offset=True))
    runs = [torch.randn(1, 1, 5, width, dtype=torch.float64) for width in widths]
    words = [nn.functional.pad(run, (0, -run.shape[-1] % FEATURES)) for run in runs]
    found = gauge(torch.cat(words, -1))
    truth = torch.einsum("bxsw,jdw->bjsd", torch.cat(runs, -1), gauge.weight)
    torch.testing.assert_close(found, truth + gauge.offset[:, None])
    assert in_whole_words(gauge.weight, widths).shape[-1] % FEATURES == 0
    if len(runs) == 1:  # which may come without
        torch.testing.assert_close(gauge(runs[0]), found)
