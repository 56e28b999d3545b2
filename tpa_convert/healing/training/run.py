"""Healing: bring a converted model back to its source by distillation on plain text."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
)

from tpa_convert.errors import UserError
from tpa_convert.forward.divergence import (
    Divergence,
    default_chunk_tokens,
    hidden_distance,
    skewed_kl,
)
from tpa_convert.forward.passes import block_forward
from tpa_convert.healing.monitoring.callbacks import (
    SOURCE_PERPLEXITY,
    VALID_AGREEMENT,
    VALID_LOSS,
    VALID_PERPLEXITY,
    GracefulStop,
    Intervals,
    LossGuard,
    Speedometer,
    Validation,
    curve,
)
from tpa_convert.healing.monitoring.dashboard import Dashboard
from tpa_convert.healing.monitoring.report import HealingReport
from tpa_convert.healing.monitoring.trackers import trackers
from tpa_convert.healing.training.adapters import is_adapter, mlp_adapters
from tpa_convert.healing.training.checkpoints import (
    check_disk,
    check_run,
    fingerprint,
    newest_checkpoint,
)
from tpa_convert.healing.training.checks import (
    check_models,
    check_step,
    hidden_weight_for,
    memory_errors,
    quiet_transformers,
)
from tpa_convert.healing.training.data import (
    BlockDataset,
    blocks_that_fit,
    collate,
    largest_divisor,
)
from tpa_convert.healing.training.distributed import (
    processes,
    refuse_difference,
    sharding,
    smallest,
)
from tpa_convert.healing.training.flops import flops_per_token
from tpa_convert.healing.training.settings import HealingSettings
from tpa_convert.healing.training.trainer import (
    DistillationTrainer,
    in_attention,
    modules_to_compile,
    parameter_groups,
    restore_offloaded,
)

LOGS = "runs"  # tensorboard's event files, in the output directory
ADAM_BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
# transformers renamed it after 5.17.
GRADIENT_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


class HealingInterrupted(KeyboardInterrupt):
    """A signal stopped the run after `step` of `steps`; a checkpoint is there to continue from."""

    def __init__(self, step: int, steps: int):
        super().__init__(
            f"healing stopped after step {step} of {steps}; the same command continues from there"
        )
        self.step = step
        self.steps = steps


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents_or_blocks: Tensor | Iterable[Any],
    *,
    output_dir: str | Path,
    settings: HealingSettings | None = None,
    resume: bool = True,
    valid_blocks: LongTensor | None = None,
    divergence: Divergence | None = None,
    progress: bool = True,
) -> HealingReport:
    """Train `student`, in place, towards the next-token distributions of `teacher`.

    The student is trained in fp32 (under bf16 autocast on a GPU) and ends in eval mode, in fp32, on
    the training device. The teacher keeps its dtype and moves there too; on a GPU, load it in
    bfloat16.

    Under `accelerate launch` or `torchrun`, all processes call this with the same arguments and
    share the work. With FSDP the teacher ends sharded, and the student stays where it is and is
    healed in the first process only.

    Args:
        student: any Hugging Face causal language model whose logits are `lm_head(hidden states)`.
        teacher: another one with the same vocabulary.
        tokenizer: of both; not needed for ready-made blocks.
        documents_or_blocks: documents as `calibration.packing.packed_blocks` takes them, or blocks
            of token ids [N, L] of any integer type.
        output_dir: where checkpoints live (in `checkpoints/`), to resume from and to delete later,
            and event files for tensorboard (in `runs/`); all processes have to see it.
        settings: by default `HealingSettings()`.
        resume: continue from the newest checkpoint in `output_dir`. If False, they are deleted.
        valid_blocks: held-out blocks [M, L]; both models are compared on them before, every
            `valid_steps` and after. `stop_at` needs them.
        divergence: what to minimise; by default `skewed_kl` as the settings say.
        progress: show the run on stderr, as a live panel, or line by line where that is no
            terminal.

    Raises:
        UserError: models that do not fit together, checkpoints of another run, too little memory or
            disk space, no text, a loss that is not finite or far above where it began.
        HealingInterrupted: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    settings = settings or HealingSettings()
    if settings.stop_at is not None and valid_blocks is None:
        raise UserError("`stop_at` needs held-out text to judge by: give `valid_text`")
    if settings.offload_teacher and sharding():
        raise UserError("FSDP shards the source already: leave out `offload_teacher`")
    check_models(student, teacher)
    settings = replace(
        settings, hidden_weight=hidden_weight_for(student, teacher, settings.hidden_weight)
    )
    blocks = _blocks(documents_or_blocks, tokenizer, settings)
    output_dir = Path(output_dir)
    checkpoints = output_dir / "checkpoints"
    this_run = fingerprint(settings, teacher, blocks, valid_blocks, sharded=sharding())
    state = processes()
    refuse_difference(this_run, "text or settings")
    if state.is_main_process:
        if not resume and checkpoints.exists():
            shutil.rmtree(checkpoints)
        newest = newest_checkpoint(checkpoints)
        check_disk(student, output_dir, newest)
        check_run(output_dir / "healing.json", this_run, newest)
    state.wait_for_everyone()
    checkpoint = newest_checkpoint(checkpoints)

    student.float()
    lora = settings.trainable == "lora"
    with mlp_adapters(student, settings.lora_rank, settings.seed) if lora else nullcontext():
        return _train(
            student,
            teacher,
            blocks,
            checkpoints,
            checkpoint,
            settings=settings,
            valid_blocks=valid_blocks,
            divergence=divergence
            or partial(skewed_kl, skew=settings.skew, temperature=settings.temperature),
            progress=progress and state.is_main_process,
        )


def _train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: Tensor,
    checkpoints: Path,
    checkpoint: Path | None,
    *,
    settings: HealingSettings,
    valid_blocks: LongTensor | None,
    divergence: Divergence,
    progress: bool,
) -> HealingReport:
    for name, parameter in student.named_parameters():
        trained = settings.trainable == "all" or in_attention(name) or is_adapter(name)
        parameter.requires_grad_(trained)
    whole_student = student
    if sharding():
        student = copy.deepcopy(student)  # FSDP changes a model for good
    args = _training_arguments(student, settings, blocks.shape[1], checkpoints)
    compiled = settings.torch_compile
    if compiled is None:
        compiled = args.device.type == "cuda"
    groups = parameter_groups(
        student,
        attention_learning_rate=settings.attention_learning_rate,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    speedometer = Speedometer(settings.tokens_per_step)
    stop = GracefulStop()
    cost = flops_per_token(student, teacher, blocks.shape[1])
    dashboard = Dashboard(speedometer, stop, cost) if progress else None
    stop.announce = progress and not (dashboard and dashboard.is_live)
    use_cache = student.config.use_cache  # the Trainer turns it off
    dtype = torch.bfloat16 if args.bf16 else torch.float32

    def compile_if(function: Callable) -> Callable:
        return torch.compile(function, dynamic=False) if compiled else function

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
        optimizer_cls_and_kwargs=(
            torch.optim.AdamW,
            {"params": groups, "lr": settings.learning_rate, "betas": ADAM_BETAS, "fused": True},
        ),
        callbacks=[
            Intervals(),
            speedometer,
            LossGuard(),
            *([dashboard] if dashboard else []),
            *trackers(settings.log_to, checkpoints.parent / LOGS),
            stop,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    validation = None
    if valid_blocks is not None:
        validation = Validation(trainer, valid_blocks, settings.valid_steps, settings.stop_at)
        trainer.add_callback(validation)

    # Offloaded layers have hooks that do not compile.
    teacher_modules = [] if settings.offload_teacher else modules_to_compile(teacher)
    start = time.perf_counter()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        with memory_errors(args.per_device_train_batch_size):
            trainer.measure_channels()
            with (
                quiet_transformers(),
                block_forward(student, modules_to_compile(student) if compiled else (), args.bf16),
                block_forward(teacher, teacher_modules if compiled else (), args.bf16),
                stop,
            ):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if sharding():
            weights = trainer.accelerator.get_state_dict(student)  # whole in the first process
            if processes().is_main_process:
                whole_student.load_state_dict(weights)
    finally:
        if dashboard:
            dashboard.close()
        trainer.remove_hooks()
        if settings.offload_teacher:
            restore_offloaded(teacher)
        _release(whole_student, use_cache)
    end = trainer.state
    recovered = validation is not None and validation.recovered
    if end.global_step < end.max_steps and not recovered:
        raise HealingInterrupted(end.global_step, end.max_steps)

    return HealingReport(
        steps=end.global_step,
        tokens=end.global_step * settings.tokens_per_step,
        resumed_from=int(checkpoint.name.split("-")[1]) if checkpoint else 0,
        seconds=time.perf_counter() - start,
        tokens_per_second=speedometer.tokens_per_second,
        batch_size=args.per_device_train_batch_size,
        peak_memory_bytes=(
            torch.cuda.max_memory_allocated() if args.device.type == "cuda" else None
        ),
        losses=curve(end, "loss"),
        valid_losses=curve(end, VALID_LOSS),
        valid_perplexities=curve(end, VALID_PERPLEXITY),
        valid_agreements=curve(end, VALID_AGREEMENT),
        source_perplexity=next((value for _, value in curve(end, SOURCE_PERPLEXITY)), None),
        recovered=recovered,
    )


def _blocks(
    documents_or_blocks: Tensor | Iterable[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    settings: HealingSettings,
) -> Tensor:
    if isinstance(documents_or_blocks, Tensor):
        blocks = documents_or_blocks
        if blocks.ndim != 2 or not len(blocks):
            raise UserError(f"blocks must be a tensor [N, L], N > 0, not {list(blocks.shape)}")
    else:
        # Imported here, so that ready-made blocks work where `datasets` is not installed.
        from tpa_convert.text.packing import packed_blocks

        if tokenizer is None:
            raise UserError("documents need a tokenizer: pass one, or pass token blocks")
        check_step(settings.tokens_per_step, settings.block_length)
        wanted = settings.steps * (settings.tokens_per_step // settings.block_length)
        blocks = packed_blocks(
            documents_or_blocks, tokenizer, settings.block_length, wanted, settings.seed
        )
    check_step(settings.tokens_per_step, blocks.shape[1])
    return blocks


def _training_arguments(
    student: PreTrainedModel, settings: HealingSettings, block_length: int, directory: Path
) -> TrainingArguments:
    device, count = processes().device, processes().num_processes
    cuda = device.type == "cuda"
    blocks_per_step = settings.tokens_per_step // block_length
    if blocks_per_step % count:
        raise UserError(
            f"a step has {blocks_per_step} blocks, which {count} processes cannot share "
            "equally: change `tokens_per_step`"
        )
    blocks_per_device = blocks_per_step // count
    limit = settings.batch_size or smallest(
        blocks_that_fit(
            student,
            block_length,
            device,
            settings.gradient_checkpointing,
            shards=count if sharding() else 1,
        )
    )
    batch_size = largest_divisor(blocks_per_device, limit)
    steps = settings.steps
    bf16 = cuda and torch.cuda.is_bf16_supported() if settings.bf16 is None else settings.bf16
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=blocks_per_device // batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(settings.warmup_steps, steps // 4),
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


def _release(student: PreTrainedModel, use_cache: bool) -> None:
    """Undo what training leaves on the model."""
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(student).pop(name, None)
    student.zero_grad()
    if getattr(student, f"is_{GRADIENT_CHECKPOINTING}"):
        getattr(student, f"{GRADIENT_CHECKPOINTING}_disable")()
    student.config.use_cache = use_cache
    student.eval()
