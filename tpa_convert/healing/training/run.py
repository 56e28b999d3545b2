"""Healing: bring a converted model back to its source by distillation on plain text."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.errors import UserError
from tpa_convert.forward.divergence import Divergence, skewed_kl
from tpa_convert.forward.ids import check_ids
from tpa_convert.forward.passes import block_forward
from tpa_convert.healing.monitoring.callbacks import (
    SOURCE_PERPLEXITY,
    VALID_AGREEMENT,
    VALID_LOSS,
    VALID_PERPLEXITY,
    curve,
)
from tpa_convert.healing.monitoring.report import HealingReport
from tpa_convert.healing.monitoring.trackers import check_trackers
from tpa_convert.healing.training.adapters import mlp_adapters
from tpa_convert.healing.training.arguments import GRADIENT_CHECKPOINTING
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
from tpa_convert.healing.training.distributed import (
    collect,
    processes,
    refuse_difference,
    sharding,
)
from tpa_convert.healing.training.needs import disk_needed
from tpa_convert.healing.training.preparation import CHECKPOINTS, Run, prepare
from tpa_convert.healing.training.trainer import modules_to_compile, restore_offloaded
from tpa_convert.healing.training.widths import even_widths
from tpa_convert.modeling.tpa_coder import RowCoder
from tpa_convert.options.healing import HealingSettings


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
    share the work. With FSDP all weights come from the first process, and the others need no more
    than the `distributed.outline` of both models. The first one, too, has outlines from when it has
    given its weights away; it gets the healed student back, in main memory, but not the teacher,
    and after an error neither.

    Args:
        student: any Hugging Face causal language model with a head for its logits.
        teacher: another one with the same vocabulary.
        tokenizer: of both; not needed for ready-made blocks.
        documents_or_blocks: documents as `text.packing.packed_blocks` takes them, or blocks
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
    settings = _prepared_settings(settings or HealingSettings(), student, teacher, valid_blocks)
    blocks = _blocks(documents_or_blocks, tokenizer, settings)
    for found in (blocks, valid_blocks):
        if found is not None:
            check_ids(student, found)
    this_run = fingerprint(settings, teacher, blocks, valid_blocks, sharded=sharding())
    output_dir = Path(output_dir)
    shards = processes().num_processes if sharding() else 1
    disk = disk_needed(student, settings, shards=shards)
    checkpoint = _claim_checkpoints(output_dir, this_run, disk, resume)
    student.float()
    lora = settings.trainable == "lora"
    adapters = mlp_adapters(student, settings.lora_rank, settings.seed) if lora else nullcontext()
    with even_widths(student), adapters:
        run = prepare(
            student,
            teacher,
            blocks,
            settings=settings,
            output_dir=output_dir,
            valid_blocks=valid_blocks,
            divergence=divergence
            or partial(skewed_kl, skew=settings.skew, temperature=settings.temperature),
            progress=progress and processes().is_main_process,
        )
        seconds = _train(run, checkpoint)
    return _report(run, checkpoint, seconds)


def _prepared_settings(
    settings: HealingSettings,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    valid_blocks: Tensor | None,
) -> HealingSettings:
    """The settings, checked against what they are to be used with."""
    check_trackers(settings.log_to)
    if settings.stop_at is not None and valid_blocks is None:
        raise UserError("`stop_at` needs held-out text to judge by: give `valid_text`")
    if settings.offload_teacher and sharding():
        raise UserError("FSDP shards the source already: leave out `offload_teacher`")
    check_models(student, teacher)
    weight = hidden_weight_for(student, teacher, settings.hidden_weight)
    coded = any(isinstance(module, RowCoder) for module in student.modules())
    return settings.with_rates(coded).model_copy(update={"hidden_weight": weight})


def _claim_checkpoints(
    output_dir: Path, this_run: dict[str, Any], disk: int, resume: bool
) -> Path | None:
    """The newest checkpoint of this run, once it is sure that the directory is this run's and has
    room for `disk` bytes."""
    checkpoints = output_dir / CHECKPOINTS
    refuse_difference(this_run, "text or settings")
    if processes().is_main_process:
        if not resume and checkpoints.exists():
            shutil.rmtree(checkpoints)
        newest = newest_checkpoint(checkpoints)
        check_disk(disk, output_dir, newest)
        check_run(output_dir / "healing.json", this_run, newest)
    processes().wait_for_everyone()
    return newest_checkpoint(checkpoints)


def _train(run: Run, checkpoint: Path | None) -> float:
    """Train from a checkpoint on, or from the start; returns the seconds that it took.

    The models end as they were, but for the student's weights.

    Raises:
        HealingInterrupted: the run was stopped.
    """
    trainer, bf16 = run.trainer, run.trainer.args.bf16
    start = time.perf_counter()
    if trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    student_modules = modules_to_compile(run.student) if run.compiled else []
    # Offloaded layers have hooks that do not compile.
    compiled_teacher = run.compiled and not run.settings.offload_teacher
    teacher_modules = modules_to_compile(run.teacher) if compiled_teacher else []
    try:
        with memory_errors(trainer.args.per_device_train_batch_size):
            trainer.measure_channels()
            with (
                quiet_transformers(),
                block_forward(run.student, student_modules, bf16),
                block_forward(run.teacher, teacher_modules, bf16),
                run.stop,
            ):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if sharding():
            collect(run.student, run.whole_student)
    finally:
        if run.dashboard:
            run.dashboard.close()
        trainer.remove_hooks()
        if run.settings.offload_teacher:
            restore_offloaded(run.teacher)
        _release(run.whole_student, run.use_cache)
    end = trainer.state
    if end.global_step < end.max_steps and not run.recovered:
        raise HealingInterrupted(end.global_step, end.max_steps)
    return time.perf_counter() - start


def _report(run: Run, checkpoint: Path | None, seconds: float) -> HealingReport:
    """What the run did, from the curves that the Trainer kept."""
    end, args = run.trainer.state, run.trainer.args
    cuda = args.device.type == "cuda"
    return HealingReport(
        steps=end.global_step,
        tokens=end.global_step * run.settings.tokens_per_step,
        resumed_from=int(checkpoint.name.split("-")[1]) if checkpoint else 0,
        seconds=seconds,
        tokens_per_second=run.speedometer.tokens_per_second,
        batch_size=args.per_device_train_batch_size,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        losses=curve(end, "loss"),
        valid_losses=curve(end, VALID_LOSS),
        valid_perplexities=curve(end, VALID_PERPLEXITY),
        valid_agreements=curve(end, VALID_AGREEMENT),
        source_perplexity=next((value for _, value in curve(end, SOURCE_PERPLEXITY)), None),
        recovered=run.recovered,
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


def _release(student: PreTrainedModel, use_cache: bool) -> None:
    """Undo what training leaves on the model."""
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(student).pop(name, None)
    student.zero_grad()
    if getattr(student, f"is_{GRADIENT_CHECKPOINTING}"):
        getattr(student, f"{GRADIENT_CHECKPOINTING}_disable")()
    student.config.use_cache = use_cache
    student.eval()
