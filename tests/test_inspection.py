"""`inspect` and `export` as a user starts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.command_line import CONVERT, error_of, save_source, save_text, tpa_convert
from tests.conftest import make_tiny_tokenizer
from tests.conversions import random_coded
from tests.tiny_models import MODELS
from tpa_convert.cli.inspection import sparkline
from tpa_convert.export.inspection import inspect

LEGACY = sorted((Path(__file__).parent / "legacy").iterdir())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    out = folder / "converted"
    arguments = (*CONVERT, "--gauge", "applied", "--out", out)
    result = tpa_convert("convert", save_source(folder / "source"), *arguments)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def healed(converted: Path) -> Path:
    text, valid = (save_text(converted.parent / name) for name in ("text.txt", "valid.txt"))
    valid.write_text("Another text altogether, to hold out. " * 200)
    out = converted.parent / "healed"
    settings = ("--tokens", "128", "--tokens-per-step", "64", "--block-length", "32")
    files = ("--text", text, "--valid-text", valid, "--out", out)
    result = tpa_convert("heal", converted, *files, *settings)
    assert result.exit_code == 0, result.output
    return out


def test_bytes_are_those_of_the_live_cache(converted: Path) -> None:
    found = inspect(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    cache = model(model.dummy_inputs["input_ids"][:1], use_cache=True).past_key_values
    tokens = cache.get_seq_length()
    live = [(layer.keys.nbytes + layer.values.nbytes) / tokens for layer in cache.layers]
    assert list(found.layer_bytes) == live
    assert found.kv_bytes == 128
    assert found.source_kv_bytes == 256
    assert found.weights.parameters == model.num_parameters()


def test_coded_caches_are_counted_in_bytes(tmp_path: Path) -> None:
    model = random_coded()
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    cache = model(model.dummy_inputs["input_ids"][:1], use_cache=True).past_key_values
    tokens = cache.get_seq_length()
    live = [(layer.keys.nbytes // tokens, layer.values.nbytes // tokens) for layer in cache.layers]
    assert list(found.rows) == live
    result = tpa_convert("inspect", tmp_path)
    assert "key codes: 4x8 2x8" in result.output


def test_no_weights_are_loaded(converted: Path, tmp_path: Path) -> None:
    """What stands behind the header of the file is not read."""
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header:] = b"\xff" * (len(data) - header)
    file.write_bytes(data)
    assert inspect(copy).weights == inspect(converted).weights
    file.write_bytes(data[: header - 20])  # but a header that is cut is told
    result = tpa_convert("inspect", copy)
    assert "model.safetensors is damaged" in error_of(result)


def test_what_is_shown(healed: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    result = tpa_convert("inspect", healed, "--json", path)
    assert result.exit_code == 0, result.output
    output = result.output
    assert "cache bytes per token (float32)" in output
    assert "50.0%" in output
    assert "layers 0-1: static head factors, gauge applied; key width 8, value width 8" in output
    assert "healed on 128 tokens: held-out perplexity" in output
    assert str(healed.parent / "source") in output.replace("\n", "")
    found = json.loads(path.read_text())
    assert [layer["width_k"] for layer in found["layers"]] == [8, 8]
    assert found["kv_bytes"] == sum(layer["kv_bytes"] for layer in found["layers"]) == 128
    (step,) = found["healings"]
    assert step["tokens"] == step["curve"][-1][0] == 128
    assert found["provenance"]["convert"]["settings"]["kv_ratio"] == 0.5


@pytest.mark.parametrize("directory", LEGACY, ids=lambda path: path.name)
def test_checkpoints_of_version_0_1(directory: Path) -> None:
    found = inspect(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    cache = model(model.dummy_inputs["input_ids"][:1], use_cache=True).past_key_values
    live = [layer.keys.shape[-1] + layer.values.shape[-1] for layer in cache.layers]
    assert [shape.cached_floats(found.kv_heads) for shape in found.shapes] == live
    result = tpa_convert("inspect", directory)
    assert result.exit_code == 0, result.output
    assert "tpa, without a record of its making" in result.output


def test_what_is_no_converted_model_is_refused(converted: Path, tmp_path: Path) -> None:
    assert "no such directory" in error_of(tpa_convert("inspect", tmp_path / "none"))
    source = converted.parent / "source"
    assert "not a converted model" in error_of(tpa_convert("inspect", source))


def test_a_curve_in_a_line() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert len(sparkline(range(1000))) == 24


# ------------------------------------------------------------------------------- export


def test_an_export_is_a_plain_model_with_a_record(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "llama"
    result = tpa_convert("export", converted, "--to", "llama", "--out", out)
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM with the same logits" in result.output
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "auto_map" not in config
    assert not list(out.glob("*.py"))
    record = json.loads((out / "tpa_convert.json").read_text())
    assert record["export"] == {"to": "llama"}
    assert record["convert"]["settings"]["kv_ratio"] == 0.5
    assert "LlamaForCausalLM" in (out / "README.md").read_text()
    assert "exists" in error_of(tpa_convert("export", converted, "--to", "dense", "--out", out))
    again = tpa_convert("export", converted, "--to", "dense", "--out", out, "--overwrite")
    assert again.exit_code == 0, again.output
    assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == 2


def test_exports_that_cannot_be_are_one_line(converted: Path, tmp_path: Path) -> None:
    gguf = tpa_convert("export", converted, "--to", "gguf", "--out", tmp_path / "model")
    assert error_of(gguf).endswith(f"--out {tmp_path / 'model'}.gguf")
    file = tpa_convert("export", converted, "--to", "gguf", "--out", tmp_path / "model.gguf")
    assert "only byte-level BPE tokenizers" in error_of(file)
    source = tpa_convert(
        "export", converted.parent / "source", "--to", "llama", "--out", tmp_path / "model"
    )
    assert "not a converted model" in error_of(source)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_made_for_it_loses_no_room(converted: Path, tmp_path: Path) -> None:
    source, made = converted.parent / "source", tmp_path / "made"
    result = tpa_convert("convert", source, *CONVERT, "--target", "llama", "--out", made)
    assert result.exit_code == 0, result.output
    for directory, hint in ((made, False), (converted, True)):
        out = tmp_path / f"{directory.name}-llama"
        result = tpa_convert("export", directory, "--to", "llama", "--out", out)
        assert result.exit_code == 0, result.output
        assert ("--target llama" in result.output) == hint
    assert json.loads((tmp_path / "made-llama" / "config.json").read_text())["head_dim"] == 8


def test_a_plan_for_a_llama_is_one_width_and_measures_the_shared_table(
    converted: Path, tmp_path: Path
) -> None:
    source, file, found = converted.parent / "source", tmp_path / "plan.yaml", tmp_path / "out.json"
    arguments = [*CONVERT, "--calibration-blocks", "4", "--target", "llama", "--multiple-of", "2"]
    planned = tpa_convert("plan", source, *arguments, "--out", file, "--json", found)
    assert planned.exit_code == 0, planned.output
    assert f"--target llama --plan {file} --out" in " ".join(planned.output.split())
    candidates = json.loads(found.read_text())["candidates"]
    assert {candidate["split"] for candidate in candidates} == {"uniform"}
    for candidate in candidates:
        assert len({layer["key_pairs"] for layer in candidate["layers"]}) == 1, "one table"
    made, plain = tmp_path / "made", tmp_path / "plain"
    arguments = ["--plan", file, "--target", "llama", "--calibration-blocks", "4"]
    result = tpa_convert("convert", source, *arguments, "--block-length", "32", "--out", made)
    assert result.exit_code == 0, result.output
    assert tpa_convert("export", made, "--to", "llama", "--out", plain).exit_code == 0
    config = json.loads((plain / "config.json").read_text())
    assert config["head_dim"] == 8  # the next multiple of what half of 2 heads of 8 needs


@pytest.mark.parametrize("arguments", [["--key-cache", "latent"], ["--cache-bits", "4"]])
def test_a_plan_of_other_caches_is_none_for_a_llama(converted: Path, arguments) -> None:
    source = converted.parent / "source"
    refused = tpa_convert("plan", source, "--target", "llama", *arguments)
    assert "target" in error_of(refused)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--key-cache", "latent"], "--target llama needs rotated keys of 16 bits"),
        (["--form", "affine"], "--target llama needs --form static"),
        (["--no-whiten"], "--target llama needs --whiten"),
    ],
)
def test_what_does_not_go_with_a_target(converted: Path, tmp_path, arguments, reason) -> None:
    source = converted.parent / "source"
    refused = tpa_convert(
        "convert", source, *CONVERT, "--target", "llama", *arguments, "--out", tmp_path / "out"
    )
    assert reason in error_of(refused)


def test_a_source_that_is_no_llama_is_told_before_any_work(tmp_path: Path) -> None:
    MODELS["qwen3"]().save_pretrained(tmp_path / "source")
    make_tiny_tokenizer().save_pretrained(tmp_path / "source")
    refused = tpa_convert(
        "convert", tmp_path / "source", *CONVERT, "--target", "llama", "--out", tmp_path / "out"
    )
    assert "a Qwen3ForCausalLM is no Llama inside" in error_of(refused)
