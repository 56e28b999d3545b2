"""Helpers shared by the tests of healing: tiny runs, and a teacher's perturbed copy."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests.conftest import make_tiny_llama
from tpa_convert.healing import HealingReport, HealingSettings, heal

SETTINGS = HealingSettings(
    tokens=12 * 64,
    tokens_per_step=64,
    batch_size=4,
    attention_learning_rate=1e-2,
    learning_rate=3e-3,
    warmup_steps=2,
    save_steps=5,
)


def plain_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, skew: float = 0.0
) -> Tensor:
    teacher = torch.softmax(teacher_logits / temperature, -1)
    student = torch.softmax(student_logits / temperature, -1)
    ratio = torch.log(teacher) - torch.log(skew * teacher + (1 - skew) * student)
    return temperature**2 * (teacher * ratio).sum(-1).mean()


def perturbed(model: Any, seed: int) -> Any:
    """A copy with noise on the attention weights, as a lossy conversion leaves them."""
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "self_attn" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.5 * parameter.std() * noise
    return student


class StopAt(TrainerCallback):
    """Sends this process a signal during a given step."""

    def __init__(self, step: int, number: int):
        self.step = step
        self.number = number

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def run(output_dir: Path, blocks: Tensor, **changes: Any) -> tuple[HealingReport, Any]:
    teacher = make_tiny_llama()
    student = perturbed(teacher, seed=0)
    options = HealingSettings(**(dict(SETTINGS) | changes))
    report = heal(
        student, teacher, None, blocks, settings=options, output_dir=output_dir, progress=False
    )
    return report, student
