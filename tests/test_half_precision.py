"""Converted models run in 16 bits in every family, as their sources do."""

from __future__ import annotations

import pytest
import torch

from tests.conversions import convert_coded, convert_tiny
from tests.tiny_models import MODELS
from tpa_convert.errors import UserError

KINDS = {
    "coded": convert_coded,
    "rotated": lambda source: convert_tiny(source, width_k=16, width_v=8),
    "latent": lambda source: convert_tiny(source, key_cache="latent", width_k=12, width_v=8),
}


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_every_kind_of_cache(family) -> None:
    """Positions are fp32 in some families (Olmo 2, Ernie 4.5), which must not spread to what is
    attended to. Logits are nearer to those of fp32 than to those of another token."""
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    for kind, convert in KINDS.items():
        try:
            model = convert(MODELS[family]())
        except UserError:  # has no such kind
            continue
        exact = model(ids, use_cache=False).logits
        model = model.to(torch.bfloat16)
        output = model(ids[:, :-1], use_cache=True)
        assert output.logits.dtype == torch.bfloat16
        step = model(ids[:, -1:], past_key_values=output.past_key_values).logits[:, -1]
        found = torch.nn.functional.cosine_similarity(step.float(), exact[:, -1], dim=-1)
        other = torch.nn.functional.cosine_similarity(step.float(), exact[:, 0], dim=-1)
        assert (found > other).all(), (kind, found, other)
