"""Two processes heal as one does: the same loss curve, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.command_line import CONVERT, error_of, save_source, save_text, tpa_convert
from tests.healing_worker import STEPS, VARIANTS, run
from tpa_convert.errors import UserError
from tpa_convert.healing.distributed import sharding


def launch(module: str, *arguments: object) -> str:
    """Runs a module in two processes; returns what they print."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.run(
        [*launcher, "--nproc-per-node=2", "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_heal_as_one_does(fsdp: bool, tmp_path: Path) -> None:
    """Interrupted and resumed, with a tied output head and without, in full and with adapters."""
    launch("tests.healing_worker", tmp_path, *(["--fsdp"] if fsdp else []))
    for name, variant in VARIANTS.items():
        directory = tmp_path / name
        report: dict[str, Any] = json.loads((directory / "report.json").read_text())
        expected, student = run(tmp_path / f"one-{name}", **variant)
        assert report["resumed_from"] == 3
        assert report["batch_size"] == expected.batch_size == 2
        assert [step for step, _ in report["losses"]] == list(range(1, STEPS + 1))
        for kind in ("losses", "valid_losses"):
            torch.testing.assert_close(
                [loss for _, loss in report[kind]],
                [loss for _, loss in getattr(expected, kind)],
                rtol=1e-4,
                atol=1e-6,
            )
        weights = torch.load(directory / "student.pt")
        assert weights.keys() == student.state_dict().keys()
        for key, weight in student.state_dict().items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-3, atol=1e-4)
        [checkpoint] = (directory / "checkpoints").iterdir()
        assert (checkpoint / "pytorch_model_fsdp_0").is_dir() == fsdp


def test_the_command_line_writes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, text = save_source(tmp_path / "source"), save_text(tmp_path / "text.txt")
    small, healed = tmp_path / "small", tmp_path / "healed"
    assert tpa_convert("convert", source, "--out", small, *CONVERT).exit_code == 0
    options = ["--tokens", 256, "--tokens-per-step", 64, "--block-length", 32]
    options += ["--sampled-tokens", 64, "--valid-text", save_text(tmp_path / "valid.txt")]
    output = launch("tpa_convert.cli", "heal", small, "--text", text, "--out", healed, *options)
    assert output.count("Healed on 256 tokens") == 1
    assert output.count("Wrote") == 1
    record = json.loads((healed / "tpa_convert.json").read_text())
    assert record["heal"]["report"]["steps"] == 4
    assert not (tmp_path / "healed.healing").exists()
    assert AutoModelForCausalLM.from_pretrained(healed).config.model_type == "tpa"

    monkeypatch.setenv("WORLD_SIZE", "2")
    result = tpa_convert("eval", healed)
    assert "only `tpa-convert heal` shares its work" in error_of(result)


def test_version_1_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sharding()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="--fsdp_version 2"):
        sharding()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding()
