"""What `heal --dry-run` says a run needs: counted by hand, and beside what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import benchmark
from tests.command_line import CONVERT, error_of, save_source, tpa_convert
from tests.test_needs import LARGE
from tpa_convert.families import family_of
from tpa_convert.forward.divergence import CHUNK_BYTES
from tpa_convert.healing import HealingSettings
from tpa_convert.healing.training.needs import healing_needs
from tpa_convert.plans import plan_widths


def models(shape: dict[str, Any], width: tuple[int, int], **how: Any) -> tuple[Any, Any]:
    """A student of these widths and its teacher, without weights."""
    config = LlamaConfig(**shape)
    family = family_of(config)
    plan = plan_widths([width] * shape["num_hidden_layers"], family.attention_sizes(config), **how)
    with torch.device("meta"):
        student = family.causal_lm(family.tpa_config(config, [asdict(x) for x in plan.layers]))
        return student, LlamaForCausalLM(config)


def matrices(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "batch", "measured"), [("1b", 16, 46.3e9), ("135m-third", 32, 23.0e9)]
)
def test_memory_is_about_what_was_measured(name, batch, measured) -> None:
    """Peaks of one H100: notes healing-throughput and heal-hidden-states of 2026-11-25. More than
    was needed may be said, less may not."""
    script = benchmark("heal_throughput")
    how = dict(script.CONVERTED[name])
    found = models(script.SHAPES[name], how.pop("widths"), **how)
    needs = healing_needs(*found, HealingSettings())
    predicted = needs.gpu + (batch - 1) * needs.sequence
    assert measured < predicted < 1.15 * measured


def test_eight_billion_fit_one_gpu_with_adapters() -> None:
    student, teacher = models(LARGE, (512, 512), gauge="applied", key_cache="latent")
    parameters, source = student.num_parameters(), teacher.num_parameters()

    def needs(shards: int = 1, **options: Any) -> Any:
        settings = HealingSettings(**options)
        return healing_needs(student, teacher, settings, shards=shards)

    whole = needs()
    assert whole.memory == 4 * parameters + 2 * source
    assert whole.disk == 24 * parameters
    head = 2 * 2 * 128256 * 4096
    working = head + CHUNK_BYTES + whole.sequence
    assert whole.gpu == 18 * parameters + 2 * source + working
    less = needs(gradient_checkpointing=True)
    assert less.sequence < whole.sequence / 5
    attention = needs(gradient_checkpointing=True, trainable="attention")
    trained = sum(matrices(layer.self_attn) for layer in student.model.layers)
    assert less.gpu - attention.gpu == 14 * (parameters - trained)
    adapters = needs(gradient_checkpointing=True, trainable="lora", lora_rank=16)
    in_and_out = 32 * 3 * 16 * (4096 + 14336)
    assert adapters.gpu - attention.gpu == (4 + 14) * in_and_out
    offloaded = needs(gradient_checkpointing=True, trainable="lora", offload_teacher=True)
    layers = 2 * matrices(teacher.model.layers)
    assert adapters.gpu - offloaded.gpu == layers * 31 // 32
    assert offloaded.gpu < adapters.gpu < 80e9 < less.gpu < whole.gpu
    assert needs(shards=8).gpu < whole.gpu / 5
    assert student.num_parameters() == parameters  # as it was


# ------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("needs")
    save_source(folder / "source")
    options = ["--out", folder / "small", *CONVERT]
    assert tpa_convert("convert", folder / "source", *options).exit_code == 0
    for path in folder.rglob("*.safetensors"):
        path.unlink()  # no weight is read
    (folder / "empty.txt").touch()  # and no text
    return folder / "small"


def dry_run(small: Path, *options: object) -> tuple[dict[str, Any], str]:
    path = small.parent / "needs.json"
    path.unlink(missing_ok=True)
    result = tpa_convert("heal", small, *options, "--dry-run", "--json", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text()), " ".join(result.stdout.split())


def test_a_dry_run_says_what_other_options_need(small: Path) -> None:
    found, shown = dry_run(small, "--text", small.parent / "empty.txt", "--tokens", 1_000_000)
    assert list(found["ways"]) == [
        "as asked",
        "--gradient-checkpointing",
        "--gradient-checkpointing --trainable lora",
        "--gradient-checkpointing --trainable lora --offload-teacher",
        "FSDP on 8 GPUs",
    ]
    assert found["capacity"] is found["seconds"] is None
    assert "There is no GPU here." in shown
    assert "31 steps of 32,768 tokens need up to" in shown
    asked = ["--gradient-checkpointing", "--trainable", "attention"]
    found, _ = dry_run(small, "--text", small.parent / "empty.txt", *asked)
    assert list(found["ways"]) == ["as asked", "--offload-teacher", "FSDP on 8 GPUs"]


def test_a_dry_run_says_what_fits(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = dry_run(small, "--text", small.parent / "empty.txt")
    sizes = sorted(way["gpu"] for way in found["ways"].values())
    device = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=sizes[-1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    found, shown = dry_run(small, "--text", small.parent / "empty.txt")
    assert found["seconds"] == found["ways"]["as asked"]["flops"] / (0.4 * 989e12)
    fitting = sum(size < sizes[-1] for size in sizes)
    assert (shown.count(" yes "), shown.count(" no ")) == (fitting, 5 - fitting)
    assert 0 < fitting < 5
    assert "NVIDIA H100 80GB HBM3 has" in shown


def test_what_a_dry_run_cannot_know(small: Path, tmp_path: Path) -> None:
    said = error_of(tpa_convert("heal", tmp_path / "none", "--text", "x.txt", "--dry-run"))
    assert "no such directory" in said
    said = error_of(tpa_convert("heal", small, "--text", small.parent / "empty.txt"))
    assert "say where to write the model with --out DIR" in said
