"""What a dry run says that a conversion needs, counted by hand where it can be counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.command_line import tpa_convert
from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.tiny_models import CONFIGS, WINDOW
from tpa_convert import pipeline
from tpa_convert.pipeline import needs as measured
from tpa_convert.pipeline.needs import Needs, sizes_of
from tpa_convert.pipeline.prediction import predict
from tpa_convert.recipe import ConvertOptions

LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def one_machine(monkeypatch) -> None:
    """What this machine does in a second differs from call to call."""
    monkeypatch.setattr(measured, "_seconds_of_product", lambda: 0.01)
    monkeypatch.setattr(measured, "_seconds_of_eigenproblem", lambda: 0.1)


def needs(config: Any, directory: Path, **options: Any) -> Needs:
    directory.mkdir(exist_ok=True)
    config.save_pretrained(directory)
    given = ConvertOptions(**{"kv_ratio": 0.125, "calibration_blocks": 16, **options})
    found = pipeline.preview(str(directory), given, with_needs=True).needs
    assert found is not None
    return found


def test_parts_of_a_model_are_counted() -> None:
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**LARGE))
        experts = MixtralForCausalLM(
            MixtralConfig(**LARGE, num_local_experts=8, num_experts_per_tok=2)
        )
    sizes = sizes_of(llama, "self_attn")
    assert sizes.attention == 2 * 4096 * 4096 + 2 * 4096 * 1024
    assert sizes.layer == sizes.attention + 3 * 4096 * 14336 + 2 * 4096
    assert sizes.embedding == 4096 * 128256
    assert sizes.used == llama.num_parameters()
    others = 32 * 6 * 3 * 4096 * 14336  # experts that a token is not sent to
    assert sizes_of(experts, "self_attn").used == experts.num_parameters() - others


@pytest.mark.parametrize("options", [{}, {"refit": True}], ids=["", "refit"])
def test_memory_is_of_a_layer_and_disk_of_the_model(tmp_path: Path, options: Any) -> None:
    one = needs(LlamaConfig(**LARGE), tmp_path / "one", **options)
    half = needs(LlamaConfig(**LARGE | {"num_hidden_layers": 16}), tmp_path / "half", **options)
    assert one.memory == half.memory
    assert 4e9 < one.memory < 8e9  # a quarter to a half of its weights in bf16
    assert 16e9 < one.disk < 25e9
    assert one.disk - half.disk > 16 * 2 * 218e6
    assert one.seconds > half.seconds


def test_without_calibration_less_is_needed(tmp_path: Path) -> None:
    plain = {"kv_ratio": 0.5, "whiten": False, "cache_bits": "16"}
    weights_alone = needs(LlamaConfig(**LARGE), tmp_path / "model", **plain)
    calibrated = needs(LlamaConfig(**LARGE), tmp_path / "model")
    refitted = needs(LlamaConfig(**LARGE), tmp_path / "model", refit=True)
    assert weights_alone.memory < calibrated.memory
    assert calibrated.seconds < refitted.seconds
    assert calibrated.disk < refitted.disk < calibrated.disk + 1e9
    assert weights_alone.disk < calibrated.disk
    assert weights_alone.seconds < calibrated.seconds


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_tiny_llama("gqa").save_pretrained(tmp_path / "source")
    make_tiny_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_dry_run_says_so(source: Path, tmp_path: Path) -> None:
    result = tpa_convert(
        "convert", source, "--kv-ratio", 0.5, "--dry-run", "--json", tmp_path / "x"
    )
    assert "of memory" in result.stdout
    assert "of disk beside the source" in " ".join(result.stdout.split())
    assert json.loads((tmp_path / "x").read_text())["needs"].keys() == {
        "memory", "disk", "seconds"
    }  # fmt: skip


def test_bytes_of_layers_with_windows_are_told_at_two_lengths(source: Path, tmp_path: Path) -> None:
    """Short of a window all tokens are cached; beyond it, only those of the other layers grow."""
    config = CONFIGS["cwm"]()
    for options in (ConvertOptions(kv_ratio=0.5), ConvertOptions(kv_ratio=0.5, cache_bits="16")):
        prediction = predict(config, options)
        assert prediction.windows == (WINDOW, None, WINDOW)
        bytes_of_all = prediction.source_kv_bytes, prediction.kv_bytes
        assert prediction.cached_at(WINDOW) == pytest.approx([WINDOW * x for x in bytes_of_all])
        tokens = 2 * WINDOW + 1000
        assert prediction.cached_at(1000) == pytest.approx([tokens * x / 3 for x in bytes_of_all])
    config.save_pretrained(tmp_path / "windows")
    for folder, told in ((tmp_path / "windows", True), (source, False)):
        result = tpa_convert("convert", folder, "--kv-ratio", 0.5, "--dry-run")
        for tokens in ("2,048", "32,768"):
            assert (f"cache bytes of {tokens} tokens" in result.stdout) == told, result.output


def test_weights_that_grow_are_told(source: Path) -> None:
    options = ["--kv-ratio", 0.9, "--gauge", "absorbed", "--dry-run"]
    said = " ".join(tpa_convert("convert", source, *options).stdout.split())
    assert "The weights grow by" in said
    assert "--gauge applied avoids that" in said


def test_a_profile_says_where_the_time_went(source: Path, tmp_path: Path) -> None:
    options = ["--kv-ratio", 0.5, "--calibration-blocks", 4, "--block-length", 32, "--profile"]
    result = tpa_convert("convert", source, *options, "--out", tmp_path / "out")
    for stage in ("checking the source", "calibrating", "choosing codes", "converting", "writing"):
        assert stage in result.stdout
    assert "sampling text" not in result.stdout  # a source as small as this samples none unasked
    sampled = (*options, "--sampled-blocks", 1, "--out", tmp_path / "sampled")
    assert "sampling text" in tpa_convert("convert", source, *sampled).stdout
    assert "GB a second" in result.stdout
