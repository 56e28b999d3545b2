"""Keys made of codes, as `benchmarks/whole_numbers.py` emulates them."""

from __future__ import annotations

import torch

from tpa_convert.modeling.tpa_kernels import find_coded

from .benchmarks import benchmark
from .conftest import make_tiny_llama
from .conversions import convert_coded, random_blocks


def test_keys_of_codes_are_those_of_features_and_eight_bits_round_them() -> None:
    model = convert_coded(make_tiny_llama())
    layers = [layer.self_attn for layer in model.model.layers]
    ids = random_blocks(count=2, length=40)
    emulation, kernels, found = benchmark("whole_numbers"), find_coded(), []
    tables = [emulation.made_for(layer, kernels) for layer in layers]
    with torch.no_grad():
        found.append(model(input_ids=ids, use_cache=True).logits)
        for whole in (False, True):
            pairs = zip(layers, tables, strict=True)
            in_eight = [emulation.emulate(layer, *made, whole) for layer, made in pairs]
            assert any(in_eight) == whole
            found.append(model(input_ids=ids, use_cache=True).logits)
    truth, of_codes, in_eight_bits = found
    size = truth.abs().max()
    assert (of_codes - truth).abs().max() < 1e-5 * size
    # What later layers code may fall to the other side of an edge.
    assert 1e-3 * size < (in_eight_bits - truth).abs().max() < 0.2 * size
