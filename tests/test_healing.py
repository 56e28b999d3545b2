"""Healing: what is trained and how far, in short runs on tiny random Llamas."""

from __future__ import annotations

import json
import math
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tests.conftest import make_tiny_llama
from tests.healing import SETTINGS, StopAt, perturbed, plain_kl, run
from tpa_convert.errors import UserError
from tpa_convert.healing import HealingInterrupted, HealingReport, HealingSettings, heal
from tpa_convert.healing.training import preparation
from tpa_convert.text.packing import packed_blocks


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_perturbed_copy_heals(
    gradient_checkpointing: bool, random_tokens: Any, tmp_path: Path
) -> None:
    teacher = make_tiny_llama()
    student = perturbed(teacher, seed=0)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    options = dict(SETTINGS) | {
        "tokens": 60 * 64,
        "gradient_checkpointing": gradient_checkpointing,
    }
    report = heal(
        student,
        teacher,
        None,
        random_tokens(64, 16),
        settings=HealingSettings(**options),
        output_dir=tmp_path,
        valid_blocks=random_tokens(7, 16, seed=9),
        progress=True,
    )
    assert report.steps == 60
    assert report.tokens == 60 * 64
    assert report.resumed_from == 0
    assert report.valid_loss_after < 0.5 * report.valid_loss_before
    assert [step for step, _ in report.losses] == list(range(1, 61))
    assert report.losses[-1][1] < 0.5 * report.losses[0][1]
    assert json.loads(json.dumps(asdict(report)))["steps"] == 60

    # The models are left as they were found, but for the student's weights.
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert not student.training
    assert student.config.use_cache
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in student.modules())
    assert student(random_tokens(1, 4)).logits.shape == (1, 4, 128)


def test_documents_are_tokenised(tmp_path: Path) -> None:
    """They are packed into blocks in the order of the seed, as blocks of one's own would be."""
    words = WordLevel({f"w{i}": i for i in range(127)} | {"</s>": 127}, unk_token="w0")
    backend = Tokenizer(words)
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    documents = [" ".join(f"w{(i * j) % 127}" for i in range(40)) for j in range(20)]

    def healed(name: str, text: Any, seed: int = 5, **changes: Any) -> HealingReport:
        options = dict(SETTINGS) | {"tokens": 128, "block_length": 16, "seed": seed} | changes
        return heal(
            make_tiny_llama(seed=1),
            make_tiny_llama(),
            tokenizer,
            text,
            settings=HealingSettings(**options),
            output_dir=tmp_path / name,
            progress=False,
        )

    report = healed("documents", documents)
    assert report.steps == 2
    blocks = packed_blocks(documents, tokenizer, 16, 128 // 16, seed=5)
    assert healed("blocks", blocks.long()).losses == report.losses
    assert healed("another seed", documents, seed=6).losses != report.losses


def test_a_run_stops_early_when_it_has_recovered(random_tokens: Any, tmp_path: Path) -> None:
    teacher = make_tiny_llama()
    valid = random_tokens(8, 16, seed=9)

    def healed(name: str, **changes: Any) -> HealingReport:
        options = dict(SETTINGS) | {"tokens": 60 * 64, "valid_steps": 10} | changes
        return heal(
            perturbed(teacher, seed=0),
            teacher,
            None,
            random_tokens(64, 16),
            settings=HealingSettings(**options),
            output_dir=tmp_path / name,
            valid_blocks=valid,
            progress=False,
        )

    whole = healed("whole")
    assert [step for step, _ in whole.valid_losses] == [0, 10, 20, 30, 40, 50, 60]
    assert not whole.recovered
    wanted = whole.valid_losses[3][1]  # reached at step 30
    early = healed("early", stop_at=math.expm1(wanted) * 1.001)
    assert early.recovered
    assert early.steps == 30
    assert early.tokens == 30 * 64
    assert early.valid_loss_after == pytest.approx(wanted, rel=1e-4)
    assert [step for step, _ in early.losses] == list(range(1, 31))

    with pytest.raises(UserError, match="`stop_at` needs held-out text"):
        heal(
            teacher,
            teacher,
            None,
            valid,
            settings=HealingSettings(stop_at=0.1),
            output_dir=tmp_path,
        )


def test_only_the_attention_is_trained_if_asked(random_tokens: Any, tmp_path: Path) -> None:
    teacher = make_tiny_llama()
    before = {name: p.clone() for name, p in perturbed(teacher, seed=0).named_parameters()}
    report, student = run(tmp_path, random_tokens(20, 16), trainable="attention")
    assert report.losses[-1][1] < report.losses[0][1]
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) != (".self_attn." in name), name


def test_a_larger_teacher_of_the_same_vocabulary(random_tokens: Any, tmp_path: Path) -> None:
    teacher = make_tiny_llama("mha", seed=4, hidden_size=48, num_hidden_layers=3, head_dim=12)
    student, blocks = make_tiny_llama(), random_tokens(40, 16)
    options = HealingSettings(**(dict(SETTINGS) | {"tokens": 40 * 64, "torch_compile": False}))
    student_logits, teacher_logits = (m(blocks[:4]).logits[:, :-1] for m in (student, teacher))
    expected = plain_kl(student_logits, teacher_logits, 1.0)
    report = heal(
        student,
        teacher,
        None,
        blocks,
        settings=options,
        output_dir=tmp_path,
        progress=False,
        valid_blocks=blocks[:4],
    )
    assert report.valid_loss_before == pytest.approx(expected.item(), rel=1e-4)
    assert report.losses[-1][1] < 0.8 * report.losses[0][1]
    options = options.model_copy(update={"hidden_weight": 0.1})
    with pytest.raises(
        UserError, match=r"2 layers of width 32, the source 3 .* 48; set `hidden_wei"
    ):
        heal(student, teacher, None, blocks, settings=options, output_dir=tmp_path / "other")


@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_teacher_teaches_the_same(
    tied: bool, random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = random_tokens(20, 16)
    teacher = make_tiny_llama(tie_word_embeddings=tied)
    devices: list[str] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            devices.extend(p.device.type for p in teacher.model.layers.parameters())

    trainer = preparation.DistillationTrainer
    monkeypatch.setattr(
        preparation,
        "DistillationTrainer",
        lambda **kwargs: trainer(**{**kwargs, "callbacks": [*kwargs["callbacks"], Look()]}),
    )

    def healed(name: str, **changes: Any) -> HealingReport:
        return heal(
            perturbed(teacher, seed=0),
            teacher,
            None,
            blocks,
            settings=HealingSettings(**(dict(SETTINGS) | {"tokens": 3 * 64} | changes)),
            output_dir=tmp_path / name,
            progress=False,
        )

    before = {name: p.clone() for name, p in teacher.named_parameters()}
    expected = healed("beside")
    assert set(devices) == {"cpu"}
    devices.clear()
    assert healed("offloaded", offload_teacher=True).losses == expected.losses
    assert set(devices) == {"meta"}
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert not any("forward" in vars(module) for module in teacher.modules())


class SeenRates(TrainerCallback):
    """Notes the learning rate of each parameter that is trained, by name."""

    def __init__(self, seen: dict[str, float]):
        self.seen = seen

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        names = {p: name for name, p in kwargs["model"].named_parameters()}
        for group in kwargs["optimizer"].param_groups:
            self.seen.update({names[p]: group["initial_lr"] for p in group["params"]})


def test_lora_trains_the_attention_and_adapters_that_end_merged(
    random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, settings = random_tokens(20, 16), {"trainable": "lora", "lora_rank": 2}
    start = perturbed(make_tiny_llama(), seed=0)
    report, student = run(tmp_path / "whole", blocks, **settings)
    assert report.losses[-1][1] < report.losses[0][1]
    assert student.state_dict().keys() == start.state_dict().keys()
    assert not hasattr(student, "peft_config")
    for (name, parameter), before in zip(
        student.named_parameters(), start.parameters(), strict=True
    ):
        change = (parameter - before).detach()
        assert bool(change.any()) == (".self_attn." in name or ".mlp." in name), name
        if ".mlp." in name:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2

    seen: dict[str, float] = {}
    with monkeypatch.context() as patch:
        trainer = preparation.DistillationTrainer

        def interrupted_trainer(**kwargs: Any) -> Any:
            kwargs["callbacks"] += [StopAt(6, signal.SIGTERM), SeenRates(seen)]
            return trainer(**kwargs)

        patch.setattr(preparation, "DistillationTrainer", interrupted_trainer)
        with pytest.raises(HealingInterrupted):
            run(tmp_path / "parts", blocks, **settings)
    layer = "model.layers.0."
    assert {name for name in seen if name.startswith(layer) and "mlp" in name} == {
        f"{layer}mlp.{linear}.lora_{part}.default.weight"
        for linear in ("gate_proj", "up_proj", "down_proj")
        for part in "AB"
    }
    assert {rate for name, rate in seen.items() if "lora" in name} == {3e-3}
    assert {rate for name, rate in seen.items() if "lora" not in name} == {1e-2}
    resumed, again = run(tmp_path / "parts", blocks, **settings)
    assert resumed.resumed_from == 7
    for parameter, expected in zip(again.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'tpa-convert\[lora\]'"):
        run(tmp_path / "without", blocks, **settings)


@pytest.mark.gpu
def test_heals_on_a_gpu_in_bfloat16(random_tokens: Any, tmp_path: Path) -> None:
    teacher = make_tiny_llama()
    student = perturbed(teacher, seed=0)
    report = heal(
        student,
        teacher,
        None,
        random_tokens(64, 16),
        settings=HealingSettings(**(dict(SETTINGS) | {"tokens": 60 * 64, "batch_size": None})),
        output_dir=tmp_path,
        valid_blocks=random_tokens(8, 16, seed=9),
        progress=False,
    )
    assert report.valid_loss_after < 0.6 * report.valid_loss_before
    assert report.peak_memory_bytes > 0
    assert next(student.parameters()).dtype == torch.float32
