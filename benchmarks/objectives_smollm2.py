"""What to minimise and how fast, in healing: one change a row, from the same refined model.

    python benchmarks/objectives_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf --heal-tokens 5e6 \\
        --train healing-train.jsonl.xz --valid healing-valid.jsonl.xz --rows 'KL|rate'
"""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import torch
from smollm2 import Table, heal_row, load, parser, train_blocks
from torch import Tensor

from tpa_convert.calibration.moments import collect_moments
from tpa_convert.conversion import convert_model
from tpa_convert.planning import Budget, plan_uniform
from tpa_convert.refinement import RefinementSettings, refine


def reverse_kl(student_logits_CV: Tensor, teacher_logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student ‖ teacher), summed over tokens, and its gradient."""
    log_student = torch.log_softmax(student_logits_CV, -1, dtype=torch.float32)
    log_teacher = torch.log_softmax(teacher_logits_CV, -1, dtype=torch.float32)
    student, ratio = log_student.exp(), log_student - log_teacher
    divergence = (student * ratio).sum(-1, keepdim=True)
    gradient = student * (ratio - divergence)
    return divergence.sum(), gradient.to(student_logits_CV.dtype)


def skewed_kl(
    student_logits_CV: Tensor, teacher_logits_CV: Tensor, share: float = 0.1
) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ share · teacher + (1 − share) · student) (Ko et al., arXiv 2402.03898)."""
    student = torch.softmax(student_logits_CV, -1, dtype=torch.float32)
    log_teacher = torch.log_softmax(teacher_logits_CV, -1, dtype=torch.float32)
    teacher = log_teacher.exp()
    mixture = (share * teacher + (1 - share) * student).clamp_min(1e-30)
    divergence = (teacher * (log_teacher - mixture.log())).sum()
    pull = teacher / mixture
    gradient = (1 - share) * student * ((student * pull).sum(-1, keepdim=True) - pull)
    return divergence, gradient.to(student_logits_CV.dtype)


ROWS: dict[str, dict[str, Any]] = {
    "forward KL": {},
    "reverse KL": {"divergence": reverse_kl},
    "skewed KL, 0.1": {"divergence": partial(skewed_kl, share=0.1)},
    "temperature 2": {"temperature": 2.0},
    "attention only": {"trainable": "attention"},
    "rates halved": {"attention_learning_rate": 3e-4, "learning_rate": 1e-4},
    "rates doubled": {"attention_learning_rate": 12e-4, "learning_rate": 4e-4},
    "one rate, 6e-4": {"learning_rate": 6e-4},
    "the rest at 2e-5": {"learning_rate": 2e-5},
    "steps of 16 k tokens": {"tokens_per_step": 16 * 1024},
    "steps of 64 k tokens": {"tokens_per_step": 64 * 1024},
    "weight decay 0.1": {"weight_decay": 0.1},
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--heal-tokens", type=float, default=5e6)
    options.add_argument("--floats", type=int, default=128)
    options.add_argument("--refine-steps", type=int, default=600)
    options.add_argument("--rows", default="", help="only rows that match this pattern")
    arguments = options.parse_args()
    source = load(arguments.source)
    config = source.architecture.llama_config(source.model.config)
    table = Table.start(source, arguments.valid, arguments.valid_blocks)
    blocks = train_blocks(arguments.train, source, 1024, arguments.calibration_blocks)
    plan = plan_uniform(config, Budget(kv_floats=arguments.floats), gauge="absorbed")
    refined = convert_model(source, plan, collect_moments(source, blocks))
    refined = refined.to(source.model.device)
    refine(source.model, refined, blocks, RefinementSettings(steps=arguments.refine_steps))
    table.row("refined", refined, plan.kv_floats, 0.0)
    training = train_blocks(arguments.train, source, 1024)
    for name, changes in ROWS.items():
        if re.search(arguments.rows, name):
            torch._dynamo.reset()
            student = copy.deepcopy(refined)
            heal_row(table, name, student, training, arguments, plan.kv_floats, **changes)


if __name__ == "__main__":
    main()
