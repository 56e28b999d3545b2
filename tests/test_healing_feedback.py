"""What a healing run tells of itself: held-out comparison, panel, lines, logs and summary."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerState

from tests.conftest import make_tiny_llama
from tpa_convert.errors import UserError
from tpa_convert.forward.comparison import compare
from tpa_convert.healing import HealingReport, HealingSettings, heal
from tpa_convert.healing.loss import comparison
from tpa_convert.healing.loss.comparison import Comparison, chunked_comparison
from tpa_convert.healing.monitoring import trackers
from tpa_convert.healing.monitoring.callbacks import GracefulStop, Speedometer
from tpa_convert.healing.monitoring.dashboard import PLAIN_LINES, Dashboard, sparkline
from tpa_convert.healing.training.hardware import peak_flops


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_comparison_is_that_of_the_evaluation(
    chunk_tokens: int, random_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = make_tiny_llama("mqa", seed=1), make_tiny_llama("gqa", seed=2)
    blocks = random_tokens(3, 16)
    monkeypatch.setattr(comparison, "default_chunk_tokens", lambda *a, **k: chunk_tokens)

    def hidden(model: Any) -> Tensor:
        return model.model(blocks).last_hidden_state[:, :-1].flatten(0, 1)

    found = Comparison.from_sums(
        chunked_comparison(
            hidden(student),
            student.lm_head.weight,
            hidden(teacher),
            teacher.lm_head.weight,
            blocks[:, 1:].flatten(),
        ),
        3 * 15,
    )
    texts, agreements = compare({"teacher": teacher, "student": student}, blocks)
    assert found.kl == pytest.approx(agreements["student"].kl, rel=1e-5)
    assert found.agreement == pytest.approx(agreements["student"].top1)
    assert found.perplexity == pytest.approx(texts["student"].perplexity, rel=1e-5)
    assert found.source_perplexity == pytest.approx(texts["teacher"].perplexity, rel=1e-5)


def healed(directory: Path, blocks: Tensor, valid: Tensor | None, **options: Any) -> HealingReport:
    settings = HealingSettings(
        tokens=8 * 64,
        tokens_per_step=64,
        batch_size=4,
        valid_steps=4,
        **options.pop("settings", {}),
    )
    student, teacher = make_tiny_llama(seed=1), make_tiny_llama(seed=2)
    return heal(
        student,
        teacher,
        None,
        blocks,
        settings=settings,
        output_dir=directory,
        valid_blocks=valid,
        **options,
    )


def test_the_report_holds_both_perplexities(random_tokens: Any, tmp_path: Path) -> None:
    valid = random_tokens(5, 16, seed=9)
    # Another divergence and temperature change what is learned, not how it is measured.
    report = healed(
        tmp_path, random_tokens(8, 16), valid, settings={"temperature": 3.0}, progress=False
    )
    models = {"teacher": make_tiny_llama(seed=2), "student": make_tiny_llama(seed=1)}
    texts, agreements = compare(models, valid)
    assert report.source_perplexity == pytest.approx(texts["teacher"].perplexity, rel=1e-5)
    assert [step for step, _ in report.valid_perplexities] == [0, 4, 8]
    assert report.valid_perplexities[0][1] == pytest.approx(texts["student"].perplexity, rel=1e-5)
    assert report.valid_losses[0][1] == pytest.approx(agreements["student"].kl, rel=1e-5)
    assert report.valid_agreements[0][1] == pytest.approx(agreements["student"].top1)


def test_without_a_terminal_there_are_plain_lines(
    random_tokens: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = healed(tmp_path, random_tokens(8, 16), random_tokens(5, 16, seed=9))
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("healing: step ") for line in lines)
    assert sum("  loss " in line for line in lines) == report.steps
    assert sum("  held-out text  perplexity " in line for line in lines) == 3
    assert f"source {report.source_perplexity:.2f}" in lines[0]
    assert re.search(r"tokens/s.* left$", lines[-3])


def dashboard(width: int, loss: list[float], held_out: bool = True) -> tuple[Dashboard, str]:
    """A dashboard in the middle of a run, and what it draws on a terminal of some width."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    speedometer = Speedometer(32 * 1024)
    speedometer.marks = [(1, 100.0), (101, 116.0)]
    panel = Dashboard(speedometer, GracefulStop(), 9.9e8, console)
    history = [
        {"step": step, "loss": value, "learning_rate": 5e-4} for step, value in enumerate(loss)
    ]
    if held_out:
        history.append(
            {
                "eval_kl": 0.05,
                "eval_perplexity": 21.0,
                "eval_source_perplexity": 20.0,
                "eval_agreement": 0.881,
            }
        )
    state = TrainerState(global_step=101, max_steps=305, log_history=history)
    args = SimpleNamespace(device=torch.device("cpu"))
    panel.on_train_begin(args, state, None)  # type: ignore[arg-type]
    panel.close()
    panel.peak = 989e12
    console.file = io.StringIO()
    console.print(panel.panel())
    return panel, console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_panel_shows_where_the_run_is(width: int) -> None:
    losses = [2.0 * 0.98**step for step in range(101)]
    panel, drawn = dashboard(width, losses)
    assert all(len(line) <= width - 3 for line in drawn.splitlines())
    assert "step 101/305" in drawn
    assert f"{losses[-1]:.4f}  █" in drawn
    assert "204,800 tokens/s  MFU 21%" in drawn
    assert "0:33 left" in drawn
    assert "learning rate 5.0e-04" in drawn
    if width >= 80:
        assert "perplexity 21.00 (source 20.00)  KL 0.0500  top-1 88.1%" in drawn
        assert "nats per token" in drawn
    assert "stopping" not in drawn
    panel.stop_request.requested = True
    panel.console.print(panel.panel())
    assert "stopping after this step" in panel.console.file.getvalue()  # type: ignore[attr-defined]


def test_a_panel_takes_the_terminal_and_gives_it_back() -> None:
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None)
        panel = Dashboard(Speedometer(1024), GracefulStop(), 1e9, console)
        assert panel.is_live == terminal
        args = SimpleNamespace(device=torch.device("cpu"))
        state = TrainerState(global_step=0, max_steps=5, log_history=[])
        panel.on_train_begin(args, state, None)  # type: ignore[arg-type]
        live = panel.live
        assert (live is not None and live.is_started) == terminal
        panel.on_train_end(args, state, None)  # type: ignore[arg-type]
        assert panel.live is None
        assert live is None or not live.is_started


def test_long_runs_have_few_plain_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    panel = Dashboard(Speedometer(1024), GracefulStop(), 1e9, console)
    args = SimpleNamespace(device=torch.device("cpu"))
    state = TrainerState(global_step=0, max_steps=10 * PLAIN_LINES, log_history=[])
    panel.on_train_begin(args, state, None)  # type: ignore[arg-type]
    for step in range(1, state.max_steps + 1):
        state.global_step = step
        panel.on_log(args, state, None, {"loss": 1.0})  # type: ignore[arg-type]
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    found = [int(re.search(r"step (\d+)", line)[1]) for line in lines]  # type: ignore[index]
    assert found == [1, *range(10, state.max_steps + 1, 10)]


def test_a_run_that_starts_has_a_panel() -> None:
    _, drawn = dashboard(80, [], held_out=False)
    assert "the first step takes longest" in drawn
    assert "perplexity" not in drawn


def test_sparkline() -> None:
    falling = sparkline([math.exp(-i / 100) for i in range(800)], 8)
    assert falling == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, 1.0], 8) == "▁▁"
    assert sparkline([3.0], 8) == "▁"


def test_peaks_of_known_devices() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA A10G") == 70e12
    assert peak_flops("NVIDIA RTX A1000") is None
    assert peak_flops("") is None


def test_tensorboard_gets_the_losses_and_the_held_out_text(
    random_tokens: Any, tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report = healed(
        tmp_path,
        random_tokens(8, 16),
        random_tokens(5, 16, seed=9),
        settings={"log_to": ("tensorboard",)},
        progress=False,
    )
    events = accumulator.EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    for tag, curve in {
        "train/loss": report.losses,
        "eval/kl": report.valid_losses,
        "eval/perplexity": report.valid_perplexities,
    }.items():
        logged = [(event.step, event.value) for event in events.Scalars(tag)]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in curve]
    assert events.Scalars("eval/source_perplexity")[0].value == pytest.approx(
        report.source_perplexity, rel=1e-6
    )


def test_logs_that_cannot_be_written_are_refused(
    random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="log_to must be tensorboard or wandb, not mlflow"):
        HealingSettings(log_to=("mlflow",))
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="`log_to` wandb needs the package wandb: pip install"):
        healed(tmp_path, random_tokens(8, 16), None, settings={"log_to": ("wandb",)})
    assert not any(tmp_path.iterdir())
