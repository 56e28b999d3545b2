"""What a run checks before, between and after its steps, and what a resumed one keeps to."""

from __future__ import annotations

import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.conftest import make_tiny_llama
from tests.healing import SETTINGS, StopAt, perturbed, run
from tpa_convert.errors import UserError
from tpa_convert.healing import HealingInterrupted, HealingSettings, heal
from tpa_convert.healing.training import preparation
from tpa_convert.healing.training.checkpoints import check_disk
from tpa_convert.healing.training.data import BlockDataset
from tpa_convert.healing.training.needs import healing_needs
from tpa_convert.healing.training.trainer import CHANNEL_FLOOR, DistillationTrainer


def change_trainer(monkeypatch: pytest.MonkeyPatch, *callbacks: TrainerCallback) -> None:
    """Adds callbacks to the trainers made from now on, and has losses logged every ten steps."""
    trainer = preparation.DistillationTrainer

    def changed(**kwargs: Any) -> Any:
        kwargs["args"].logging_steps = 10  # as on a GPU
        kwargs["callbacks"].extend(callbacks)
        return trainer(**kwargs)

    monkeypatch.setattr(preparation, "DistillationTrainer", changed)


class Poison(TrainerCallback):
    """Ruins the weights before a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            kwargs["model"].get_input_embeddings().weight.data.fill_(float("nan"))


def test_the_last_steps_are_checked_too(
    random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = random_tokens(20, 16)
    with monkeypatch.context() as patch:
        change_trainer(patch)
        report, _ = run(tmp_path / "sound", blocks)
        assert [step for step, _ in report.losses] == [1, 10, 12]
        change_trainer(patch, Poison(11))
        with pytest.raises(UserError, match="loss is nan at step 12"):
            run(tmp_path / "poisoned", blocks)


def test_a_resumed_run_saves_as_often_as_asked_for_now(
    random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = random_tokens(20, 16)
    with monkeypatch.context() as patch:
        change_trainer(patch, StopAt(2, signal.SIGTERM))
        with pytest.raises(HealingInterrupted):
            run(tmp_path, blocks, save_steps=100)
    with monkeypatch.context() as patch:
        change_trainer(patch, Poison(11))  # dies at the end
        with pytest.raises(UserError):
            run(tmp_path, blocks, save_steps=4)
    [checkpoint] = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == "checkpoint-8"


def test_another_source_or_held_out_text_does_not_continue_a_run(
    random_tokens: Any, tmp_path: Path
) -> None:
    blocks, valid = random_tokens(8, 16), random_tokens(2, 16, seed=1)
    settings = HealingSettings(**dict(SETTINGS) | {"tokens": 2 * 64})

    def again(seed: int, valid_blocks: Any, dtype: torch.dtype = torch.float32) -> int:
        teacher = make_tiny_llama(seed=seed).to(dtype)
        report = heal(
            perturbed(make_tiny_llama(), seed=0),
            teacher,
            None,
            blocks,
            settings=settings,
            valid_blocks=valid_blocks,
            output_dir=tmp_path,
            progress=False,
        )
        return report.resumed_from

    again(0, valid)
    with pytest.raises(UserError, match="a run with different source:"):
        again(1, valid)
    with pytest.raises(UserError, match="a run with different held-out text:"):
        again(0, None)
    assert again(0, valid, torch.bfloat16) == 2  # begun on a CPU, continued on a GPU


def test_disk_space_beside_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkpoints need room, of which one may be there."""
    size = 1000
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(int(1.5 * size)))
    with pytest.raises(UserError, match="make room"):
        check_disk(2 * size, tmp_path, None)
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "optimizer.pt").write_bytes(bytes(size))
    check_disk(2 * size, tmp_path, checkpoint)


@pytest.mark.parametrize("trainable", ["all", "attention", "lora"])
def test_checkpoints_hold_what_is_trained_and_take_as_much_disk_as_was_said(
    trainable: str, random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on from one ends as it would have without a stop."""
    if trainable == "lora":
        pytest.importorskip("peft")
    settings = {"trainable": trainable, "lora_rank": 2}
    blocks = random_tokens(20, 16)
    _, undisturbed = run(tmp_path / "undisturbed", blocks, **settings)
    with monkeypatch.context() as patch:
        change_trainer(patch, StopAt(3, signal.SIGTERM))
        with pytest.raises(HealingInterrupted):
            run(tmp_path / "stopped", blocks, **settings)
    [checkpoint] = (tmp_path / "stopped" / "checkpoints").iterdir()
    held = load_file(checkpoint / "model.safetensors")
    assert any("self_attn" in name for name in held)
    assert any("mlp" in name and "lora" not in name for name in held) == (trainable == "all")
    assert any("lora" in name for name in held) == (trainable == "lora")
    moments = torch.load(checkpoint / "optimizer.pt")["state"].values()
    tensors = [
        *held.values(),
        *(state[key] for state in moments for key in ("exp_avg", "exp_avg_sq")),
    ]
    teacher = make_tiny_llama()
    needs = healing_needs(perturbed(teacher, seed=0), teacher, SETTINGS.model_copy(update=settings))
    assert sum(x.nbytes for x in tensors) == needs.disk // 2
    report, resumed = run(tmp_path / "stopped", blocks, **settings)
    assert report.resumed_from is not None
    for expected, found in zip(undisturbed.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_channels_are_measured_in_pieces(
    batch_size: int, random_tokens: Any, tmp_path: Path
) -> None:
    """No more memory than a step needs; channels that hardly vary do not blow up the distance."""
    teacher = make_tiny_llama()
    teacher.get_input_embeddings().weight.data[:, 3] = 0
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight.data[3] = layer.mlp.down_proj.weight.data[3] = 0
    blocks = random_tokens(5, 16)
    states = teacher.model(blocks, output_hidden_states=True).hidden_states[1:-1]
    args = preparation.training_arguments(
        teacher, teacher, HealingSettings(tokens_per_step=80, batch_size=1), 16, tmp_path
    )
    args.per_device_train_batch_size = batch_size
    trainer = DistillationTrainer(
        model=make_tiny_llama(),
        teacher=teacher,
        args=args,
        train_dataset=BlockDataset(blocks, 5, seed=0),
        hidden_weight=1.0,
    )
    trainer.measure_channels()
    for found, state in zip(trainer.channel_variances, states, strict=False):
        variances = state.var((0, 1), correction=0)
        assert variances[3] == 0
        expected = variances.clamp_min(CHANNEL_FLOOR * variances.mean().item())
        torch.testing.assert_close(found, expected)
    trainer.remove_hooks()
