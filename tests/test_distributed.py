"""Two processes heal as one does: the same loss curve, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.command_line import CONVERT, error_of, save_source, save_text, tpa_convert
from tests.healing_worker import STEPS, VARIANTS, run
from tpa_convert.errors import UserError
from tpa_convert.healing import HealingReport
from tpa_convert.healing.training.distributed import outline, sharding


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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[HealingReport, Any]]:
    """What a process by itself reports and makes, by variant."""
    directory = tmp_path_factory.mktemp("alone")
    return {name: run(directory / name, **variant) for name, variant in VARIANTS.items()}


def check_runs(
    directory: Path, alone: Mapping[str, tuple[HealingReport, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compares all of a launch's runs with those of one process; yields their reports."""
    for name, (expected, student) in alone.items():
        report: dict[str, Any] = json.loads((directory / name / "report.json").read_text())
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


@dataclass
class Command:
    """A `heal` command on a small model, without the directory that it writes to."""

    folder: Path

    def __post_init__(self) -> None:
        source = save_source(self.folder / "source")
        self.small = self.folder / "small"
        assert tpa_convert("convert", source, "--out", self.small, *CONVERT).exit_code == 0
        self.arguments = ["heal", self.small, "--text", save_text(self.folder / "text.txt")]
        self.arguments += ["--valid-text", save_text(self.folder / "valid.txt")]
        self.arguments += ["--tokens", 256, "--tokens-per-step", 64, "--block-length", 32]
        self.arguments += ["--sampled-tokens", 64, "--out"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("command"))


class Launch(NamedTuple):
    """Two processes that went through all variants and then the command, and what they printed."""

    fsdp: bool
    directory: Path
    output: str


@pytest.fixture(scope="module", params=[False, True], ids=["data parallel", "fsdp"])
def launched(
    request: pytest.FixtureRequest, command: Command, tmp_path_factory: pytest.TempPathFactory
) -> Launch:
    """Starting processes is what takes the time, so both kinds of work are done by the same."""
    directory = tmp_path_factory.mktemp("launched")
    options = ["--interrupt", *(["--fsdp"] if request.param else [])]
    options += ["--command", *command.arguments, directory / "healed"]
    return Launch(request.param, directory, launch("tests.healing_worker", directory, *options))


@pytest.mark.slow
def test_two_processes_heal_as_one_does(launched: Launch, alone) -> None:
    """Interrupted and resumed, with a tied output head and without, in full and with adapters, with
    logits as the head leaves them and soft-capped."""
    for name, report in check_runs(launched.directory, alone):
        assert report["resumed_from"] == 3
        assert report["batch_size"] == 2
        assert report["steps"] == STEPS
        [checkpoint] = (launched.directory / name / "checkpoints").iterdir()
        assert (checkpoint / "pytorch_model_fsdp_0").is_dir() == launched.fsdp


@pytest.mark.slow
@pytest.mark.parametrize("launched", [True], ids=["fsdp"], indirect=True)
def test_no_process_holds_whole_models_that_it_does_not_need(launched: Launch) -> None:
    """In shares of the bytes of both, a tenth of which is a matrix on its way or no weight. The
    teacher is shared first."""
    for name in VARIANTS:
        first, second = (
            json.loads((launched.directory / name / f"memory-{index}.json").read_text())
            for index in range(2)
        )
        assert 0.9 < first[0] < 1.25, name  # both are loaded here
        assert second[0] < 0.25, name
        assert first[1] < 1.15, name  # the student, and half of the teacher
        assert second[1] < 0.5, name
        assert max(first[2], second[2]) < 0.95, name  # a half


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_gpus_heal_as_one_does(fsdp: bool, alone, tmp_path: Path) -> None:
    launch("tests.healing_worker", tmp_path, *(["--fsdp"] if fsdp else []), gpus="0,1")
    for _, report in check_runs(tmp_path, alone):
        assert report["steps"] == STEPS
        assert report["peak_memory_bytes"] > 0


@pytest.fixture(scope="module")
def healed_alone(command: Command) -> Path:
    """What the command makes in one process."""
    out = command.folder / "alone"
    assert tpa_convert(*command.arguments, out).exit_code == 0
    return out


@pytest.mark.slow
def test_the_command_line_heals_as_in_one_process(
    launched: Launch, command: Command, healed_alone: Path
) -> None:
    """It writes once. Under FSDP the second process has outlines of the models only."""
    assert launched.output.count("Healed on 256 tokens") == 1
    assert launched.output.count("Wrote") == 1
    healed = launched.directory / "healed"
    record = json.loads((healed / "tpa_convert.json").read_text())
    assert record["heal"]["report"]["steps"] == 4
    assert not (launched.directory / "healed.healing").exists()
    assert AutoModelForCausalLM.from_pretrained(healed).config.model_type == "tpa_llama"

    first, second = (
        json.loads((launched.directory / f"process-{index}.json").read_text()) for index in range(2)
    )
    assert first["bytes"] == first["all"] == second["all"]
    # of the outlines norms and biases
    assert (second["bytes"] < 0.05 * second["all"]) == launched.fsdp
    start, one, other = (
        load_file(directory / "model.safetensors")
        for directory in (command.small, healed_alone, healed)
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)
        if name.endswith("proj.weight"):
            assert not torch.equal(start[name], tensor), name


def test_only_healing_shares_its_work(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = tpa_convert("eval", command.small)
    assert "only `tpa-convert heal` shares its work" in error_of(result)


def test_an_outline_has_biases_and_what_is_tied() -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    outlined: Any = outline(model)
    assert outlined[0].weight.is_meta
    assert outlined[1].weight is outlined[0].weight
    assert torch.equal(outlined[0].bias, model[0].bias)
    assert not model[0].weight.is_meta


def test_version_1_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sharding()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="--fsdp_version 2"):
        sharding()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding()
