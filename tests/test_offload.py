"""Converted models with layers on disk, which come to memory when a module's forward runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conversions import convert_coded, convert_tiny, random_blocks
from tests.test_generation import LAYOUTS
from tests.tiny_models import MODELS
from tpa_convert.modeling.tpa_keys import RotatedKeys

CONVERTED = {
    **{name: ("llama", LAYOUTS[name]) for name in LAYOUTS},
    "qwen3 rotated": ("qwen3", {"kv_ratio": 0.5}),
    "gemma3 latent": ("gemma3", {"kv_ratio": 0.5, "key_cache": "latent"}),
}
CODED = {"llama coded": ("llama", 1), "qwen3 coded in blocks": ("qwen3", 2)}


@pytest.fixture(params=[*CONVERTED, *CODED])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    if request.param in CODED:
        family, blocks = CODED[request.param]
        model = convert_coded(MODELS[family](), key_blocks=blocks)
    else:
        family, conversion = CONVERTED[request.param]
        model = convert_tiny(MODELS[family](), **conversion)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("on_disk", ["one layer", "everything"])
def test_layers_on_disk_change_nothing(saved, tmp_path, on_disk) -> None:
    model, directory = saved
    places: dict[str, str] = {"": "disk"}
    if on_disk == "one layer":
        rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        places = dict.fromkeys(rest, "cpu")
        places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        directory, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    tokens = random_blocks(count=2, length=20, seed=5)
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}
    expected, found = (
        torch.stack(one.generate(tokens, **settings).logits) for one in (model, offloaded)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    rotated = [module for module in model.modules() if isinstance(module, RotatedKeys)]
    for module in rotated:  # what a buffer that loading had skipped would do
        module.rotary_pair.zero_()
    broken = torch.stack(model.generate(tokens, **settings).logits)
    assert bool((broken - expected).abs().max() > 1e-2) == bool(rotated)
