"""Conversion part by part: bit for bit what converting the whole model gives, and resumable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.conversions import random_blocks
from tests.tiny_models import MODELS
from tpa_convert import pipeline
from tpa_convert.calibration.cache_moments import collect_cache_moments
from tpa_convert.calibration.moments import collect_moments
from tpa_convert.conversion.coded import choose_codes
from tpa_convert.conversion.model import Conversion, convert_model
from tpa_convert.export import shards
from tpa_convert.forward.walk import DecoderWalk
from tpa_convert.modeling import TPAAttention
from tpa_convert.pipeline.calibration import calibration_blocks
from tpa_convert.recipe import ConvertOptions
from tpa_convert.refinement.adaptation import Adaptation, AdaptedConversion, LayerError
from tpa_convert.refinement.least_squares import refit
from tpa_convert.refinement.regression import RefinementSettings, refine
from tpa_convert.refinement.streams import Target
from tpa_convert.sources import load_source, open_source

TEXT = {"calibration_blocks": 6, "block_length": 32}
WAYS: dict[str, dict[str, Any]] = {
    "coded": {"kv_ratio": 0.25, **TEXT},
    "rotated": {"kv_ratio": 0.5, "cache_bits": "16", **TEXT},
    "weights alone": {"kv_ratio": 0.5, "key_cache": "latent", "cache_bits": "16", "whiten": False},
    "refit": {"kv_ratio": 0.25, "refit": True, **TEXT},
    "refined": {"kv_ratio": 0.5, "cache_bits": "16", "refine": True, "refine_steps": 3, **TEXT},
}
FAMILIES = ["llama", "mixtral", "qwen3", "gpt_neox", "gemma2", "cohere2"]


def save(model: Any, directory: Path) -> Path:
    model.bfloat16().save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


def whole(directory: Path, options: ConvertOptions) -> dict[str, torch.Tensor]:
    """Tensors of the conversion of a model that is in memory as a whole."""
    source = load_source(directory)
    prediction = pipeline.preview(str(directory), options)
    plan, moments = prediction.plan, None
    blocks = calibration_blocks(source, options)
    if options.whiten:
        collect = collect_cache_moments if plan.is_coded else collect_moments
        moments = collect(source, blocks)
    if plan.coded is not None:
        assert moments is not None
        plan = choose_codes(plan, moments.layers, moments.num_tokens).plan
    model = convert_model(source, plan, moments, whiten=options.whiten, dtype=torch.float32)
    if options.refit:
        refit(source.model, model, blocks)
    if options.refine:
        refine(source.model, model, blocks, RefinementSettings(steps=options.refine_steps))
    return dict(model.to(prediction.dtype).state_dict())


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_whole_model_gives(family: str, way: str, tmp_path: Path) -> None:
    options = ConvertOptions(**WAYS[way])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        source = save(MODELS[family](), tmp_path / "source")
        pipeline.convert(str(source), tmp_path / "out", options)
        expected = whole(source, options)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(found[name], tensor), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("way", ["refit", "refined"])
def test_a_conversion_that_adapts_nothing_would_be_seen(way: str, tmp_path: Path) -> None:
    options = ConvertOptions(**WAYS[way])
    source = save(make_tiny_llama("gqa"), tmp_path / "source")
    pipeline.convert(str(source), tmp_path / "out", options)
    expected = whole(source, options.model_copy(update={"refit": False, "refine": False}))
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, tensor in found.items() if not torch.equal(expected[name], tensor)}
    projections = {f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)}
    assert set() < changed <= projections if way == "refit" else changed > projections
    record = json.loads((tmp_path / "out" / "tpa_convert.json").read_text())["convert"]
    assert [len(errors) for errors in record["layer_errors"]] == [2, 2]


def test_one_layer_is_in_memory_while_it_is_adapted(tmp_path: Path) -> None:
    source = open_source(save(make_tiny_llama("gqa"), tmp_path / "source"))
    blocks, options = random_blocks(count=4), ConvertOptions(**WAYS["rotated"])
    plan = pipeline.preview(str(tmp_path / "source"), options).plan
    seen = []

    def look(walk: DecoderWalk, index: int, target: Target) -> LayerError:
        there = [not any(p.is_meta for p in layer.parameters()) for layer in walk.layers]
        seen.append((there, type(walk.attention(index))))
        return LayerError(1.0, 1.0)

    conversion = Conversion(source, plan, collect_moments(source, blocks))
    adapted = AdaptedConversion(conversion, Adaptation("look", look, 2), blocks, {})
    for index in range(len(adapted)):
        part, other = adapted.part(index), conversion.part(index)
        for name, tensor in other.tensors.items():  # nothing has changed it
            assert torch.equal(part.tensors[name], tensor), name
    assert seen == [([True, False], TPAAttention), ([False, True], TPAAttention)]
    assert all(parameter.is_meta for parameter in source.model.parameters())
    assert not any(isinstance(module, TPAAttention) for module in source.model.modules())
    assert list(adapted.store) == ["entering-00001", "entering-00002"]


def test_what_is_not_attention_has_the_bytes_of_the_source(tmp_path: Path) -> None:
    source = save(make_tiny_llama("gqa"), tmp_path / "source")
    pipeline.convert(str(source), tmp_path / "out", ConvertOptions(**WAYS["coded"]))
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    others = [name for name in before if ".self_attn." not in name]
    assert len(others) > 10
    for name in others:
        assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)), name


def test_large_models_become_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(make_tiny_llama("gqa", tie_word_embeddings=True), tmp_path / "source")
    options = ConvertOptions(**WAYS["coded"])
    pipeline.convert(str(source), tmp_path / "one", options)
    monkeypatch.setattr(shards, "ONE_FILE", 1000)
    pipeline.convert(str(source), tmp_path / "many", options)
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert "lm_head.weight" not in one
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many")]
    for (name, a), b in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_the_terms_of_the_source_go_along(tmp_path: Path) -> None:
    source = save(make_tiny_llama("gqa"), tmp_path / "source")
    (source / "LICENSE.md").write_text("As you like it.")
    pipeline.convert(str(source), tmp_path / "out", ConvertOptions(**WAYS["weights alone"]))
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "As you like it."


# ------------------------------------------------------------------------------- cut short

# Converts in children of a process that has imported everything. Each is killed when it has written
# so many groups of tensors, in the middle of the next one, until one comes to its end. Prints how
# the children of each job ended.
KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from tpa_convert import pipeline, storage
from tpa_convert.export import shards
from tpa_convert.recipe import ConvertOptions

torch.set_num_threads(1)
shards.ONE_FILE = 1000
save_file = storage.save_file

def convert(source, out, options, left):
    def dying(tensors, path, metadata):
        nonlocal left
        if left == 0:
            Path(path).write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        save_file(tensors, path, metadata)
    storage.save_file = dying
    pipeline.convert(source, out, ConvertOptions(**options))

def exit_codes(out, options, count):
    codes = []
    while not codes or codes[-1] != 0 and len(codes) < 40:
        child = os.fork()
        if child == 0:
            convert(sys.argv[1], out, options, count)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if codes[-1] != 0:
            assert not Path(out).exists()
    return codes

print(json.dumps([exit_codes(*job) for job in json.loads(sys.argv[2])]))
"""
LEAST = {"coded": 5, "rotated": 4, "refit": 6, "refined": 5}
"""Runs that it takes, by the way of converting."""


class Ended(NamedTuple):
    """Conversions of one way, undisturbed and killed: how processes ended, and what there is."""

    undisturbed: Path
    killed: Path
    codes: tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("killed")
    source = save(make_tiny_llama("gqa"), folder / "source")
    outs = [tuple(folder / way / name / "out" for name in ("whole", "killed")) for way in LEAST]
    jobs = [
        (str(out), WAYS[way], count)
        for way, pair in zip(LEAST, outs, strict=True)
        for out, count in zip(pair, (1000, 2), strict=True)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(source), json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    return {
        way: Ended(*pair, (codes[2 * i], codes[2 * i + 1]))
        for i, (way, pair) in enumerate(zip(LEAST, outs, strict=True))
    }


@pytest.mark.parametrize("way", LEAST)
def test_a_run_killed_again_and_again_gives_the_same_bytes(way: str, ended) -> None:
    """Each run is killed inside of the third group of tensors that it writes: a layer has two
    where it is measured, and two where it is converted."""
    undisturbed, killed, (once, again) = ended[way]
    assert once == [0]
    assert len(again) >= LEAST[way]
    assert set(again[:-1]) == {-signal.SIGKILL}
    assert files_of(killed) == files_of(undisturbed)
    assert [path.name for path in killed.parent.iterdir()] == ["out"]
