"""A healing run, put together: models, Trainer, what watches over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel, PrinterCallback

from tpa_convert.forward.divergence import Divergence, default_chunk_tokens, hidden_distance
from tpa_convert.healing.monitoring.callbacks import (
    GracefulStop,
    Intervals,
    LossGuard,
    Speedometer,
    Validation,
)
from tpa_convert.healing.monitoring.dashboard import Dashboard
from tpa_convert.healing.monitoring.trackers import trackers
from tpa_convert.healing.training.adapters import is_adapter
from tpa_convert.healing.training.arguments import training_arguments
from tpa_convert.healing.training.data import BlockDataset, collate
from tpa_convert.healing.training.flops import flops_per_token
from tpa_convert.healing.training.trainer import (
    DistillationTrainer,
    attention_parameters,
    parameter_groups,
)
from tpa_convert.options.healing import HealingSettings

CHECKPOINTS = "checkpoints"  # in the output directory
LOGS = "runs"  # there too: tensorboard's event files
ADAM_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Run:
    """A training run that is ready to start.

    Attributes:
        student: what is trained: under FSDP, a copy of the other that all processes share.
        whole_student: what the caller gave, and gets back healed.
        teacher: what it learns from, under FSDP a copy, too.
        compiled: whether both models are compiled.
        use_cache: of the student's config, which the Trainer turns off.
    """

    settings: HealingSettings
    student: PreTrainedModel
    whole_student: PreTrainedModel
    teacher: PreTrainedModel
    trainer: DistillationTrainer
    compiled: bool
    use_cache: bool
    speedometer: Speedometer
    stop: GracefulStop
    dashboard: Dashboard | None
    validation: Validation | None

    @property
    def recovered(self) -> bool:
        """Whether the run ended early, as near to the source as asked."""
        return self.validation is not None and self.validation.recovered


def prepare(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: Tensor,
    *,
    settings: HealingSettings,
    output_dir: Path,
    valid_blocks: LongTensor | None,
    divergence: Divergence,
    progress: bool,
) -> Run:
    """Put together everything that a run needs.

    Args:
        output_dir: where checkpoints and logs go.
        valid_blocks, divergence, progress: as `run.heal` takes them.

    Raises:
        UserError: the blocks of a step cannot be shared out equally.
    """
    choose_trained(student, settings)
    use_cache = student.config.use_cache
    args = training_arguments(student, teacher, settings, blocks.shape[1], output_dir / CHECKPOINTS)
    compiled = settings.torch_compile
    if compiled is None:
        compiled = args.device.type == "cuda"

    def compile_if(function: Callable) -> Callable:
        return torch.compile(function, dynamic=False) if compiled else function

    speedometer, stop = Speedometer(settings.tokens_per_step), GracefulStop()
    cost = flops_per_token(student, teacher, blocks.shape[1])
    dashboard = Dashboard(speedometer, stop, cost) if progress else None
    stop.announce = progress and not (dashboard and dashboard.is_live)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        offload_teacher=settings.offload_teacher,
        args=args,
        train_dataset=BlockDataset(
            blocks, args.max_steps * settings.tokens_per_step // blocks.shape[1], settings.seed
        ),
        data_collator=collate,
        divergence=compile_if(divergence),
        chunk_tokens=default_chunk_tokens(student.config.vocab_size, dtype, compiled),
        hidden_weight=settings.hidden_weight or 0.0,
        distance=compile_if(hidden_distance),
        callbacks=[
            Intervals(),
            speedometer,
            LossGuard(),
            *([dashboard] if dashboard else []),
            *trackers(settings.log_to, output_dir / LOGS),
            stop,
        ],
    )
    trainer.optimizer_cls_and_kwargs = _optimizer(trainer.model, settings)
    trainer.remove_callback(PrinterCallback)
    validation = None
    if valid_blocks is not None:
        validation = Validation(trainer, valid_blocks, settings.valid_steps, settings.stop_at)
        trainer.add_callback(validation)
    return Run(
        settings=settings,
        student=trainer.model,
        whole_student=student,
        teacher=trainer.teacher,
        trainer=trainer,
        compiled=compiled,
        use_cache=use_cache,
        speedometer=speedometer,
        stop=stop,
        dashboard=dashboard,
        validation=validation,
    )


def choose_trained(student: PreTrainedModel, settings: HealingSettings) -> None:
    """Gives gradients to what is trained. Adapters, if it is them, are in the model already."""
    attention = attention_parameters(student)
    for name, parameter in student.named_parameters():
        trained = settings.trainable == "all" or parameter in attention or is_adapter(name)
        parameter.requires_grad_(trained)
    head_bias = getattr(student.get_output_embeddings(), "bias", None)
    if head_bias is not None:  # what the loss makes of the head's product, it has no gradient for
        head_bias.requires_grad_(False)


def _optimizer(
    student: PreTrainedModel, settings: HealingSettings
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    attention_rate, rate = settings.attention_learning_rate, settings.learning_rate
    assert attention_rate is not None
    assert rate is not None
    groups = parameter_groups(
        student,
        attention_learning_rate=attention_rate,
        learning_rate=rate,
        weight_decay=settings.weight_decay,
    )
    common = {"lr": rate, "betas": ADAM_BETAS, "fused": True}
    return torch.optim.AdamW, {"params": groups, **common}
