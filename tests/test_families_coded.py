"""Every family with the cache that `convert` makes by default: components coded in bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import make_tiny_tokenizer
from tests.conversions import random_blocks
from tests.test_families import another
from tests.tiny_models import MODELS
from tpa_convert.export.save import load_model
from tpa_convert.forward.cached import cache_argument
from tpa_convert.forward.comparison import agreement
from tpa_convert.pipeline import convert
from tpa_convert.recipe import ConvertOptions

RATIO = 0.25


@pytest.mark.parametrize("name", MODELS)
def test_a_quarter_of_the_bytes(name: str, tmp_path: Path) -> None:
    source = MODELS[name]()
    source.save_pretrained(tmp_path / "source")
    make_tiny_tokenizer().save_pretrained(tmp_path / "source")
    options = ConvertOptions(kv_ratio=RATIO, block_length=32, calibration_blocks=16)
    result = convert(str(tmp_path / "source"), tmp_path / "out", options)
    assert result.prediction.kv_bytes <= RATIO * result.prediction.source_kv_bytes
    model = load_model(tmp_path / "out", dtype=torch.float32)
    assert all(shape.coded for shape in model.config.layer_shapes)

    blocks = random_blocks(count=8, length=32, seed=9)
    loss = agreement(source, model, blocks).kl
    assert loss < 0.3 * agreement(source, another(source), blocks).kl

    tokens = random_blocks(count=2, length=20)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        output = model(tokens[:, :10], use_cache=True)
        rows = [part for layer in _layers(output) for part in (layer.keys, layer.values)]
        # Of two texts; layers with a window hold as many tokens as that.
        held = sum(part.nbytes / (2 * part.shape[-2]) for part in rows)
        assert held == result.prediction.kv_bytes
        steps = [output.logits]
        for i in range(10, 20):
            output = model(tokens[:, i : i + 1], use_cache=True, **cache_argument(output))
            steps.append(output.logits)
        alone = model(tokens[:, -1:], use_cache=True).logits
    # A number on the edge of two codes may fall to either side: seldom, and by little.
    difference = (torch.cat(steps, dim=1) - whole).abs()
    assert difference.mean() < 1e-3 * whole.std()
    assert (alone - whole[:, -1:]).abs().mean() > 1e-2 * whole.std()  # without what was cached


def _layers(output):
    ((_, cache),) = cache_argument(output).items()
    return cache.layers
