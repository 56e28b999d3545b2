"""A run killed without warning loses at most one checkpoint interval and keeps its loss curve."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests.conftest import make_tiny_llama
from tpa_convert.healing import HealingReport, HealingSettings, heal
from tpa_convert.healing.training import preparation

STEPS, INTERVAL, KILLED_AT = 12, 3, 8


class KillAt(TrainerCallback):
    """Ends this process in the middle of a given step, as the kernel would."""

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def blocks() -> Tensor:
    return torch.randint(3, 128, (20, 16), generator=torch.Generator().manual_seed(5))


def run(directory: Path) -> tuple[HealingReport, Any]:
    settings = HealingSettings(
        tokens=STEPS * 64,
        tokens_per_step=64,
        batch_size=2,
        attention_learning_rate=1e-2,
        learning_rate=3e-3,
        warmup_steps=2,
        save_steps=INTERVAL,
    )
    student = make_tiny_llama(seed=3)
    report = heal(
        student,
        make_tiny_llama(),
        None,
        blocks(),
        settings=settings,
        output_dir=directory,
        progress=False,
    )
    return report, student


def killed_run(directory: Path) -> None:
    """The run of a subprocess that does not survive it."""
    trainer = preparation.DistillationTrainer
    preparation.DistillationTrainer = lambda **kwargs: trainer(  # type: ignore[assignment, misc]
        **{**kwargs, "callbacks": [*kwargs["callbacks"], KillAt()]}
    )
    run(directory)


def test_sigkill(tmp_path: Path) -> None:
    whole, expected = run(tmp_path / "whole")
    directory = tmp_path / "killed"
    code = "import sys; from pathlib import Path; from tests.test_healing_killed import killed_run;"
    process = subprocess.run(
        [sys.executable, "-c", code + "killed_run(Path(sys.argv[1]))", str(directory)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    kept = [p.name for p in (directory / "checkpoints").iterdir()]
    assert kept == [f"checkpoint-{KILLED_AT // INTERVAL * INTERVAL}"]

    report, student = run(directory)
    assert report.resumed_from == KILLED_AT // INTERVAL * INTERVAL
    assert report.resumed_from > KILLED_AT - INTERVAL
    assert json.loads((directory / "healing.json").read_text())["tokens"] == STEPS * 64
    assert [step for step, _ in report.losses] == list(range(1, STEPS + 1))
    torch.testing.assert_close(
        [loss for _, loss in report.losses], [loss for _, loss in whole.losses], rtol=1e-5, atol=0
    )
    for healed, reference in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(healed, reference, rtol=1e-4, atol=1e-6)
