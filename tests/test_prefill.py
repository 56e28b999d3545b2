"""Keys and values rebuilt some heads at a time, of rows read some tokens at a time."""

from __future__ import annotations

import pytest
import torch

from tests.conversions import convert_coded, convert_tiny
from tests.tiny_models import MODELS
from tpa_convert.modeling import tpa_coder, tpa_prefill
from tpa_convert.modeling.tpa_keys import LatentKeys, RotatedKeys

LATENT = {"key_cache": "latent", "width_k": 12, "width_v": 8}
CASES = {
    "applied": ("llama", {"width_k": 16, "width_v": 8, "gauge": "applied"}),
    "applied, normalised": ("qwen3", {"width_k": 16, "width_v": 8}),
    "affine": ("llama", {"form": "affine", "rank_k": 1, "rank_v": 1}),
    "affine, two ranks": ("llama", {"form": "affine", "rank_k": 2, "rank_v": 2}),
    "linear": ("llama", {"form": "linear", "method": "svd", "rank_k": 1, "rank_v": 1}),
    "latent": ("llama", LATENT),
    "latent, normalised": ("qwen3", LATENT),
    "latent, normalised together": ("olmo2", LATENT),
    "latent, windows and soft cap": ("gemma2", LATENT),
    "coded": ("llama", None),
    "coded, one head a query": ("gpt_neox", None),
}
PROMPT, CACHED = 11, 7


def model_of(case):
    family, settings = CASES[case]
    if settings is None:
        return convert_coded(MODELS[family](), key_blocks=2)
    return convert_tiny(MODELS[family](), **settings)


@pytest.fixture
def rebuilt(monkeypatch):
    """How many heads' keys were rebuilt at a time."""
    found = []
    for layout in (RotatedKeys, LatentKeys):

        def expand(self, *given, real=layout.expand):
            keys = real(self, *given)
            found.append(keys.shape[1])
            return keys

        monkeypatch.setattr(layout, "expand", expand)
    return found


@torch.no_grad()
def logits_in_two(model):
    """A prompt in two parts, the second on what the first has cached."""
    ids = torch.randint(3, 128, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    first = model(input_ids=ids[:, :CACHED], use_cache=True)
    second = model(input_ids=ids[:, CACHED:], past_key_values=first.past_key_values)
    return torch.cat((first.logits, second.logits), 1)


@pytest.mark.parametrize("case", CASES)
def test_heads_and_tokens_at_a_time(monkeypatch, rebuilt, case) -> None:
    model = model_of(case)
    rebuilt.clear()  # of calibration
    truth = logits_in_two(model)
    layers, heads = 3, rebuilt[0]
    assert rebuilt == 2 * layers * [heads]
    assert heads > 1
    rebuilt.clear()
    monkeypatch.setattr(tpa_prefill, "REBUILT_BYTES", 1)
    monkeypatch.setattr(tpa_coder, "AT_ONCE", 1)
    found = logits_in_two(model)
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5)
    together = case == "latent, normalised together"
    assert rebuilt == 2 * layers * ([heads] if together else heads * [1])


def test_weights_are_those_of_all_heads(monkeypatch) -> None:
    model = model_of("latent")
    model.set_attn_implementation("eager")
    ids = torch.arange(3, 9)[None]
    truth = model(input_ids=ids, output_attentions=True).attentions
    monkeypatch.setattr(tpa_prefill, "REBUILT_BYTES", 1)
    found = model(input_ids=ids, output_attentions=True).attentions
    assert found[0].shape == (1, 4, 6, 6)
    torch.testing.assert_close(found, truth, atol=1e-6, rtol=1e-6)


def test_runs_cover_all_heads(monkeypatch) -> None:
    """Four heads, three of which fit."""
    model = convert_tiny(MODELS["gpt_neox"](), width_k=16, width_v=16, gauge="applied")
    attention = model.gpt_neox.layers[0].attention
    query, packed = torch.zeros(2, 4, 5, 8), torch.zeros(2, 1, 5, 16)
    monkeypatch.setattr(tpa_prefill, "REBUILT_BYTES", 3 * 2 * 5 * 2 * 8 * 4)
    runs = tpa_prefill.runs_of_heads(attention, query, packed)
    assert [range(4)[run] for run in runs] == [range(3), range(3, 4)]
