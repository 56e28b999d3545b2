"""What a model keeps of its parameters is made anew once they may have been trained."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.conversions import convert_tiny
from tests.tiny_models import MODELS
from tpa_convert.modeling.tpa_kernels import Sources


@pytest.mark.parametrize("toggled", [True, False])
def test_a_fused_optimizer_is_noticed(toggled) -> None:
    """It changes parameters in place without a trace."""
    model = convert_tiny(MODELS["llama"](), width_k=16, width_v=8, gauge="applied").eval()
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))

    def logits(of):
        with torch.no_grad():
            return of(ids).logits

    before = logits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    if toggled:
        model.train()
    model(ids).logits.square().mean().backward()
    gauge = next(p for name, p in model.named_parameters() if "keys.gauge" in name)
    version = gauge._version
    optimizer.step()
    assert gauge._version == version  # control: nothing else would tell
    if toggled:
        model.eval()
    found = logits(model)
    fresh = copy.deepcopy(model)
    Sources.trained()
    assert torch.equal(found, logits(fresh))
    assert not torch.allclose(found, before, atol=1e-2)


def test_what_is_kept_outlives_eval_but_not_training() -> None:
    model = convert_tiny(MODELS["llama"](), width_k=16, width_v=8, gauge="applied").eval()
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    kept = model.model.layers[0].self_attn.keys.gauge.kept

    def made():
        with torch.no_grad():
            model(ids)
        return kept.made

    first = made()
    model.eval()
    assert made() is first
    model.train().eval()
    assert made() is not first
