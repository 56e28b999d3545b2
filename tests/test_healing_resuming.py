"""Interrupted runs continue where they were, and with nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_tiny_llama
from tests.healing import SETTINGS, StopAt, run
from tpa_convert.errors import UserError
from tpa_convert.healing import HealingInterrupted, HealingSettings, heal
from tpa_convert.healing.monitoring.callbacks import GracefulStop
from tpa_convert.healing.training import preparation


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_resumes_on_the_same_curve(
    number: int, random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = random_tokens(20, 16)  # fewer than the run needs, so that a second pass is resumed
    whole, expected = run(tmp_path / "whole", blocks)
    assert whole.resumed_from == 0
    assert len(whole.losses) == 12

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        trainer = preparation.DistillationTrainer

        def interrupted_trainer(**kwargs: Any) -> Any:
            kwargs["callbacks"].append(StopAt(7, number))
            return trainer(**kwargs)

        patch.setattr(preparation, "DistillationTrainer", interrupted_trainer)
        with pytest.raises(HealingInterrupted, match="step 8 of 12"):
            run(tmp_path / "parts", blocks)
    assert signal.getsignal(number) is handler

    # Another batch size may finish the run, and a half-written checkpoint is not used.
    (tmp_path / "parts" / "checkpoints" / "checkpoint-11").mkdir()
    report, student = run(tmp_path / "parts", blocks, batch_size=2)
    assert report.resumed_from == 8
    assert not (tmp_path / "parts" / "checkpoints" / "checkpoint-11").exists()
    assert report.steps == 12
    assert [step for step, _ in report.losses] == list(range(1, 13))
    torch.testing.assert_close(
        [loss for _, loss in report.losses],
        [loss for _, loss in whole.losses],
        rtol=1e-4,
        atol=1e-6,
    )
    for healed, reference in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(healed, reference, rtol=1e-3, atol=1e-4)

    # A finished run is loaded, not repeated.
    report, student = run(tmp_path / "parts", blocks)
    assert report.resumed_from == 12
    for healed, reference in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(healed, reference, rtol=1e-3, atol=1e-4)


def test_checkpoints_of_another_run_are_refused(random_tokens: Any, tmp_path: Path) -> None:
    run(tmp_path, random_tokens(8, 16), tokens=5 * 64)
    with pytest.raises(UserError, match="different learning_rate, text"):
        run(tmp_path, random_tokens(8, 16, seed=1), tokens=5 * 64, learning_rate=1e-4)
    report = heal(
        make_tiny_llama(seed=3),
        make_tiny_llama(),
        None,
        random_tokens(8, 16, seed=1),
        settings=HealingSettings(**(dict(SETTINGS) | {"tokens": 64})),
        output_dir=tmp_path,
        resume=False,
        progress=False,
    )
    assert report.resumed_from == 0
    assert report.steps == 1


@pytest.fixture
def default_interrupt() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in the background and a shell has it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("default_interrupt")
def test_second_signal_is_not_swallowed() -> None:
    with GracefulStop(announce=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
