"""Settings of a healing run as the Trainer wants them, for the devices there are."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments

from tpa_convert.errors import UserError
from tpa_convert.healing.training.data import blocks_that_fit, largest_divisor
from tpa_convert.healing.training.distributed import processes, sharding, smallest
from tpa_convert.options.healing import RATES, HealingSettings

MAX_GRADIENT_NORM = 1.0
# transformers renamed it after 5.17.
GRADIENT_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


def training_arguments(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    settings: HealingSettings,
    block_length: int,
    directory: Path,
) -> TrainingArguments:
    """The Trainer's arguments, with the batch size that fits.

    Args:
        student, teacher: wherever they are now.
        block_length: of the training text.
        directory: where the checkpoints go.

    Raises:
        UserError: the blocks of a step cannot be shared out equally.
    """
    device = processes().device
    cuda = device.type == "cuda"
    batch_size, accumulation = _batches(student, teacher, settings, block_length)
    bf16 = cuda and torch.cuda.is_bf16_supported() if settings.bf16 is None else settings.bf16
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=settings.steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate or RATES[1],
        lr_scheduler_type="cosine",
        warmup_steps=min(settings.warmup_steps, settings.steps // 4),
        max_grad_norm=MAX_GRADIENT_NORM,
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        bf16=bf16,
        # Reading a loss waits for the GPU; in between, steps are queued without waiting.
        logging_steps=10 if cuda else 1,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        accelerator_config={"non_blocking": cuda},
        dataloader_pin_memory=cuda,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        **({GRADIENT_CHECKPOINTING: True} if settings.gradient_checkpointing else {}),
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs want a launcher, not the Trainer's DataParallel
    return args


def _batches(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    settings: HealingSettings,
    block_length: int,
) -> tuple[int, int]:
    """Blocks in a forward pass of one device, and forward passes in a step."""
    device, count = processes().device, processes().num_processes
    blocks_per_step = settings.tokens_per_step // block_length
    if blocks_per_step % count:
        raise UserError(
            f"a step has {blocks_per_step} blocks, which {count} processes cannot share "
            "equally: change `tokens_per_step`"
        )
    coming = [student.parameters()]
    coming += [] if settings.offload_teacher else [teacher.parameters()]
    awaited = sum(p.nbytes for part in coming for p in part if p.device.type != device.type)
    limit = settings.batch_size or smallest(
        blocks_that_fit(
            student,
            block_length,
            device,
            settings.gradient_checkpointing,
            shards=count if sharding() else 1,
            awaited=awaited,
        )
    )
    batch_size = largest_divisor(blocks_per_step // count, limit)
    return batch_size, blocks_per_step // count // batch_size
