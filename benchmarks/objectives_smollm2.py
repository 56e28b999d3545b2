"""What to minimise and how fast, in healing: one change a row, from the same refined model.

    python benchmarks/objectives_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf --heal-tokens 5e6 \\
        --train healing-train.jsonl.xz --valid healing-valid.jsonl.xz --rows 'KL|rate'

Other models work too; short runs and small ones want smaller steps (`--settings`).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.arguments import given_settings, parser
from common.blocks import train_blocks
from common.models import load, plan_of
from common.tables import Table, heal_row
from tpa_convert.calibration.moments import collect_moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.healing import DistillationTrainer, HealingSettings
from tpa_convert.healing.training import preparation
from tpa_convert.refinement.regression import RefinementSettings, refine


def reverse_kl(student_logits_CV: Tensor, teacher_logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student ‖ teacher), summed over tokens, and its gradient."""
    log_student = torch.log_softmax(student_logits_CV, -1, dtype=torch.float32)
    log_teacher = torch.log_softmax(teacher_logits_CV, -1, dtype=torch.float32)
    student, ratio = log_student.exp(), log_student - log_teacher
    divergence = (student * ratio).sum(-1, keepdim=True)
    gradient = student * (ratio - divergence)
    return divergence.sum(), gradient.to(student_logits_CV.dtype)


def jensen_shannon(student_logits_CV: Tensor, teacher_logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of both models' KL to their mean, summed over tokens, and its gradient."""
    log_student = torch.log_softmax(student_logits_CV, -1, dtype=torch.float32)
    log_teacher = torch.log_softmax(teacher_logits_CV, -1, dtype=torch.float32)
    student, teacher = log_student.exp(), log_teacher.exp()
    log_mean = torch.logaddexp(log_student, log_teacher) - math.log(2)
    ratio = log_student - log_mean
    of_student = (student * ratio).sum(-1, keepdim=True)
    divergence = (of_student.sum() + (teacher * (log_teacher - log_mean)).sum()) / 2
    gradient = student * (ratio - of_student) / 2
    return divergence, gradient.to(student_logits_CV.dtype)


def cross_entropy(logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Of hard labels, -1 for none, summed over tokens, and its gradient."""
    counts = labels_C[:, None] >= 0
    labels = labels_C.clamp_min(0)[:, None]
    log_probabilities = torch.log_softmax(logits_CV, -1, dtype=torch.float32)
    loss = -(log_probabilities.gather(-1, labels) * counts).sum()
    gradient = log_probabilities.exp().scatter_add(-1, labels, -torch.ones_like(labels).float())
    return loss, (gradient * counts).to(logits_CV.dtype)


class HardLabels(DistillationTrainer):
    """Mixes the divergence with the cross-entropy of the text itself, which has this share."""

    def __init__(self, *, share: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.share = share

    def compute_loss(self, model, inputs, *args: Any, **kwargs: Any) -> Any:
        self.labels = inputs["input_ids"].roll(-1, dims=1)
        self.labels[:, -1] = -1
        return super().compute_loss(model, inputs, *args, **kwargs)

    def hidden_loss(self, student_hidden, teacher_hidden, teacher_weight) -> Tensor:
        chunks = iter(self.labels.flatten().split(self.chunk_tokens))
        plain = self.divergence

        def mixed(student_logits_CV: Tensor, teacher_logits_CV: Tensor) -> tuple[Tensor, Tensor]:
            soft, soft_CV = plain(student_logits_CV, teacher_logits_CV)
            hard, hard_CV = cross_entropy(student_logits_CV, next(chunks))
            return torch.lerp(soft, hard, self.share), torch.lerp(soft_CV, hard_CV, self.share)

        self.divergence = mixed
        try:
            return super().hidden_loss(student_hidden, teacher_hidden, teacher_weight)
        finally:
            self.divergence = plain


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.self_attn for layer in model.get_decoder().layers]


class AttentionOutputs(DistillationTrainer):
    """Adds the relative squared distance of what the attention layers put out, mean over them."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        teacher, student = attention_layers(self.teacher), attention_layers(self.model)
        with recorded(teacher) as self.targets, recorded(student) as self.outputs:
            return super().compute_loss(*args, **kwargs)

    def hidden_loss(self, *args: Any) -> Tensor:
        loss = super().hidden_loss(*args)
        distances = [
            (output.float() - target.float()).square().mean() / target.float().square().mean()
            for output, target in zip(self.outputs, self.targets, strict=True)
        ]
        return loss + sum(distances) / len(distances)


@contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Yields a list that fills with what the modules put out."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(hook) for module in modules]
    try:
        yield outputs
    finally:
        for registered in hooks:
            registered.remove()


# "trainer" takes DistillationTrainer's place, "times" multiplies settings of the first row, and all
# else goes to heal() and its settings.
ROWS: dict[str, dict[str, Any]] = {
    "skewed KL, 0.1": {},
    "forward KL": {"skew": 0.0},
    "skewed KL, 0.3": {"skew": 0.3},
    "skewed KL, 0.5": {"skew": 0.5},
    "reverse KL": {"divergence": reverse_kl},
    "Jensen-Shannon": {"divergence": jensen_shannon},
    "hard labels, 0.1": {"trainer": partial(HardLabels, share=0.1)},
    "hard labels, 0.3": {"trainer": partial(HardLabels, share=0.3)},
    "no hidden states": {"hidden_weight": 0.0},
    "hidden states, 10": {"hidden_weight": 10.0},
    # Hooks inside of a compiled layer would not be called.
    "attention outputs": {"trainer": AttentionOutputs, "torch_compile": False},
    "temperature 2": {"temperature": 2.0},
    "attention only": {"trainable": "attention"},
    "attention, and LoRA on the MLPs": {"trainable": "lora"},
    "rates halved": {"times": {"attention_learning_rate": 0.5, "learning_rate": 0.5}},
    "rates doubled": {"times": {"attention_learning_rate": 2, "learning_rate": 2}},
    "the same rate everywhere": {"times": {"learning_rate": 3}},
    "the rest at a tenth of its rate": {"times": {"learning_rate": 0.1}},
    "steps of half the tokens": {"times": {"tokens_per_step": 0.5}},
    "steps of twice the tokens": {"times": {"tokens_per_step": 2}},
    "weight decay 0.1": {"weight_decay": 0.1},
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--heal-tokens", type=float, default=5e6)
    options.add_argument("--run", default="128:absorbed", help="see common/models.py")
    options.add_argument("--refine-steps", type=int, default=600)
    options.add_argument("--rows", default="", help="only rows that match this pattern")
    options.add_argument("--length", type=int, default=1024, help="tokens of a block")
    options.add_argument("--settings", default="", help="of all rows: tokens_per_step=4096,seed=1")
    arguments = options.parse_args()
    source = load(arguments.source)
    config = source.family.attention_sizes(source.model.config)
    table = Table.start(source, arguments.valid, arguments.valid_blocks, arguments.length)
    length = arguments.length
    blocks = train_blocks(arguments.train, source, length, arguments.calibration_blocks)
    plan = plan_of(arguments.run, config)
    refined = convert_model(source, plan, collect_moments(source, blocks))
    refined = refined.to(source.model.device)
    refine(source.model, refined, blocks, RefinementSettings(steps=arguments.refine_steps))
    table.row("refined", refined, plan.kv_floats, 0.0)
    training = train_blocks(arguments.train, source, length)
    given = given_settings(arguments.settings)
    base = HealingSettings(**given).with_rates(coded=False)
    for name, row in ROWS.items():
        if re.search(arguments.rows, name):
            torch._dynamo.reset()
            student = copy.deepcopy(refined)
            changes = given | row
            for key, factor in changes.pop("times", {}).items():
                value = getattr(base, key)
                changes[key] = type(value)(value * factor)
            preparation.DistillationTrainer = changes.pop("trainer", DistillationTrainer)
            heal_row(table, name, student, training, arguments, plan.kv_floats, **changes)


if __name__ == "__main__":
    main()
