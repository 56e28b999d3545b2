"""Positions of the slots of a cache: the short way of unpadded decoding beside the general one."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache, StaticCache

from tpa_convert.modeling.tpa_rotary import LayerRotary, slot_positions

CONFIG = LlamaConfig(
    num_hidden_layers=1, hidden_size=8, num_attention_heads=1, num_key_value_heads=1
)
WINDOWED = LlamaConfig(**CONFIG.to_dict())
WINDOWED.sliding_window, WINDOWED.layer_types = 6, ["sliding_attention"]
CACHES = {
    "dynamic": lambda: DynamicCache(config=CONFIG),
    "static": lambda: StaticCache(config=CONFIG, max_cache_len=32),
    "window": lambda: DynamicCache(config=WINDOWED),
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CACHES)),
    st.integers(1, 20),
    st.lists(st.integers(0, 50), min_size=1, max_size=3),
)
def test_one_new_token_without_a_mask(kind, cached, positions) -> None:
    """As with a mask that leaves every slot in use."""
    cache = CACHES[kind]()
    row = torch.zeros(len(positions), 1, cached, 8)
    cache.update(row, row, 0)
    slots, _ = cache.get_mask_sizes(1, 0)
    given_positions = torch.tensor(positions)[:, None]
    used = torch.arange(slots)[None] <= (cached if kind == "static" else slots)
    arguments = cache, 0, 1, given_positions
    found = slot_positions(*arguments, None, torch.device("cpu"))
    truth = slot_positions(*arguments, used.expand(len(positions), -1), torch.device("cpu"))
    assert found.shape == (len(positions), slots)
    assert torch.equal(found, truth)


def test_layers_in_other_threads_may_clear_what_is_shared() -> None:
    """Each gets what it has made, whatever becomes of the place where it is kept."""

    class Cleared(dict):
        def __setitem__(self, key, value) -> None:
            """As if the last layer of another forward pass were done right now."""

    rotary = LayerRotary(torch.nn.Identity(), {}, Cleared(), last=False)
    assert rotary.shared((), (), lambda: "made") == "made"
