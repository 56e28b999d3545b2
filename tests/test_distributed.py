"""Two processes heal as one does: the same loss curve, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.command_line import CONVERT, error_of, save_source, save_text, tpa_convert
from tests.healing_worker import STEPS, VARIANTS, run
from tpa_convert.errors import UserError
from tpa_convert.healing.training.distributed import hollow, outline, sharding


def launch(module: str, *arguments: object, gpus: str = "") -> str:
    """Runs a module in two processes, on the CPU or these GPUs; returns what they print."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.run(
        [*launcher, "--nproc-per-node=2", "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def check_runs(directory: Path, reference: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compares all of a launch's runs with those of one process here; yields their reports."""
    for name, variant in VARIANTS.items():
        report: dict[str, Any] = json.loads((directory / name / "report.json").read_text())
        expected, student = run(reference / name, **variant)
        for kind in ("losses", "valid_losses"):
            losses = getattr(expected, kind)
            assert [step for step, _ in report[kind]] == [step for step, _ in losses]
            torch.testing.assert_close(
                [loss for _, loss in report[kind]],
                [loss for _, loss in losses],
                rtol=1e-4,
                atol=1e-6,
            )
        weights = torch.load(directory / name / "student.pt", map_location="cpu")
        assert weights.keys() == student.state_dict().keys()
        for key, weight in student.cpu().state_dict().items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-3, atol=1e-4)
        yield name, report


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_heal_as_one_does(fsdp: bool, tmp_path: Path) -> None:
    """Interrupted and resumed, with a tied output head and without, in full and with adapters, with
    logits as the head leaves them and soft-capped."""
    launch("tests.healing_worker", tmp_path, "--interrupt", *(["--fsdp"] if fsdp else []))
    for name, report in check_runs(tmp_path, tmp_path / "one"):
        assert report["resumed_from"] == 3
        assert report["batch_size"] == 2
        assert report["steps"] == STEPS
        [checkpoint] = (tmp_path / name / "checkpoints").iterdir()
        assert (checkpoint / "pytorch_model_fsdp_0").is_dir() == fsdp


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_gpus_heal_as_one_does(fsdp: bool, tmp_path: Path) -> None:
    launch("tests.healing_worker", tmp_path, *(["--fsdp"] if fsdp else []), gpus="0,1")
    for _, report in check_runs(tmp_path, tmp_path / "one"):
        assert report["steps"] == STEPS
        assert report["peak_memory_bytes"] > 0


@pytest.mark.slow
def test_the_command_line_writes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text = save_source(tmp_path / "source"), save_text(tmp_path / "text.txt")
    small, healed = tmp_path / "small", tmp_path / "healed"
    assert tpa_convert("convert", source, "--out", small, *CONVERT).exit_code == 0
    options = ["--tokens", 256, "--tokens-per-step", 64, "--block-length", 32]
    options += ["--sampled-tokens", 64, "--valid-text", save_text(tmp_path / "valid.txt")]
    output = launch("tpa_convert", "heal", small, "--text", text, "--out", healed, *options)
    assert output.count("Healed on 256 tokens") == 1
    assert output.count("Wrote") == 1
    record = json.loads((healed / "tpa_convert.json").read_text())
    assert record["heal"]["report"]["steps"] == 4
    assert not (tmp_path / "healed.healing").exists()
    assert AutoModelForCausalLM.from_pretrained(healed).config.model_type == "tpa_llama"

    monkeypatch.setenv("WORLD_SIZE", "2")
    result = tpa_convert("eval", healed)
    assert "only `tpa-convert heal` shares its work" in error_of(result)


@pytest.mark.slow
def test_sharded_models_are_loaded_by_one_process(tmp_path: Path) -> None:
    """The second has their outlines, and the result is that of a process alone."""
    source, text = save_source(tmp_path / "source"), save_text(tmp_path / "text.txt")
    small = tmp_path / "small"
    assert tpa_convert("convert", source, "--out", small, *CONVERT).exit_code == 0
    options = ["--tokens", 256, "--tokens-per-step", 64, "--block-length", 32]
    options += ["--text", text, "--sampled-tokens", 64]
    options += ["--valid-text", save_text(tmp_path / "valid.txt")]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert tpa_convert("heal", small, *options, "--out", alone).exit_code == 0
    command = ["--fsdp", "--command", "heal", small, *options, "--out", shared]
    output = launch("tests.healing_worker", tmp_path, *command)
    assert output.count("Wrote") == 1
    first, second = (
        json.loads((tmp_path / f"process-{index}.json").read_text()) for index in range(2)
    )
    assert first["bytes"] == first["all"] == second["all"]
    assert second["bytes"] < 0.05 * second["all"]  # norms and biases
    one, other = (load_file(out / "model.safetensors") for out in (alone, shared))
    assert one.keys() == other.keys()
    start = load_file(small / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)
        if name.endswith("proj.weight"):
            assert not torch.equal(start[name], tensor), name


def test_a_hollow_copy_takes_no_memory() -> None:
    with torch.device("meta"):
        model: Any = torch.nn.Sequential(torch.nn.Linear(8192, 8192), torch.nn.Linear(8192, 8192))
    model[0].bias = torch.nn.Parameter(torch.ones(8192))
    model[1].weight = model[0].weight
    before = resident_bytes()
    copied: Any = hollow(model)
    assert resident_bytes() - before < 0.2 * model[0].weight.nbytes
    weight = copied[0].weight
    assert copied[1].weight is weight
    assert weight.device.type == "cpu"
    assert torch.equal(copied[0].bias, model[0].bias)
    assert not weight[::1000].any()
    weight.data.fill_(1.0)  # negative control
    assert resident_bytes() - before > 0.9 * weight.nbytes
    assert outline(copied)[0].weight.is_meta
    assert copied[0].weight is weight


def resident_bytes() -> int:
    """Memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_version_1_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sharding()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="--fsdp_version 2"):
        sharding()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding()
