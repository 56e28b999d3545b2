"""What healing refuses: settings, inputs, and runs that go wrong."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_tiny_llama
from tests.healing import SETTINGS
from tpa_convert.errors import UserError
from tpa_convert.healing import HealingSettings, heal
from tpa_convert.healing.training.checkpoints import newest_checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, not 0"),
        ({"tokens_per_step": 0}, "tokens_per_step must be at least 1"),
        ({"block_length": 1}, "block_length must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"attention_learning_rate": float("nan")}, "attention_learning_rate must be a positive"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"warmup_steps": -1}, "warmup_steps must be zero or more"),
        ({"weight_decay": -0.1}, "weight_decay must be zero or more"),
        ({"hidden_weight": -1.0}, "hidden_weight must be zero or more"),
        ({"save_steps": 0}, "save_steps must be at least 1"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"trainable": "mlp"}, "trainable must be all, attention or lora, not mlp"),
    ],
)
def test_settings_are_validated(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HealingSettings(**change)


def test_bad_input_is_a_user_error(
    random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, blocks = make_tiny_llama(), random_tokens(8, 16)
    attempt = partial(heal, output_dir=tmp_path, settings=SETTINGS, progress=False)
    with pytest.raises(UserError, match=r"vocabularies differ \(64 and 128 tokens with"):
        attempt(make_tiny_llama(vocab_size=64), model, None, blocks)
    with pytest.raises(UserError, match=r"blocks must be a tensor \[N, L\]"):
        attempt(model, model, None, blocks[:0])
    with pytest.raises(UserError, match="multiple of the block length 15"):
        attempt(model, model, None, blocks[:, :15])
    with pytest.raises(UserError, match="documents need a tokenizer"):
        attempt(model, model, None, ["text"])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    offloaded = HealingSettings(**(dict(SETTINGS) | {"offload_teacher": True}))
    with pytest.raises(UserError, match="leave out `offload_teacher`"):
        attempt(model, model, None, blocks, settings=offloaded)
    assert not (tmp_path / "checkpoints").exists()


def test_a_loss_that_is_not_finite_stops_the_run(random_tokens: Any, tmp_path: Path) -> None:
    student = make_tiny_llama(seed=1)
    with torch.no_grad():
        student.model.norm.weight[0] = 3e38
    with pytest.raises(UserError, match="healing loss is nan at step 1: use lower learning rates"):
        heal(
            student,
            make_tiny_llama(),
            None,
            random_tokens(8, 16),
            settings=SETTINGS,
            output_dir=tmp_path,
            progress=False,
        )


def test_a_run_that_leaves_its_source_stops(random_tokens: Any, tmp_path: Path) -> None:
    teacher = make_tiny_llama()
    changes = {"attention_learning_rate": 0.1, "learning_rate": 0.1, "save_steps": 2}
    far = SETTINGS.model_copy(update={"tokens": 40 * 64, **changes})
    with pytest.raises(UserError, match=r"loss rose from 0\.\d+ to 0\.\d+ by step \d+ \("):
        heal(
            copy.deepcopy(teacher),
            teacher,
            None,
            random_tokens(8, 16),
            settings=far,
            output_dir=tmp_path,
            progress=False,
        )
    assert newest_checkpoint(tmp_path / "checkpoints") is not None  # nothing saved is lost
