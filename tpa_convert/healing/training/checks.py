"""What surrounds a training run: checks before it, and what may be said during it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from tpa_convert.errors import UserError

HIDDEN_WEIGHT = 10.0  # of models with equally many layers of one width


def check_models(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse models that cannot be distilled into each other.

    Raises:
        UserError: no output head, or different vocabularies.
    """
    sizes = {}
    for role, model in {"converted model": student, "source": teacher}.items():
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(f"cannot heal: the {role} has no output head")
        sizes[role] = len(head.weight)
    if sizes["converted model"] != sizes["source"]:
        raise UserError(
            f"cannot heal: the vocabularies differ ({sizes['converted model']} and "
            f"{sizes['source']} tokens with padding); use the source this model was converted "
            "from, or another with embeddings of that size"
        )


def check_step(tokens_per_step: int, block_length: int) -> None:
    """Refuse steps that are no whole blocks.

    Raises:
        UserError: they are not.
    """
    if tokens_per_step % block_length:
        raise UserError(
            f"`tokens_per_step` must be a multiple of the block length {block_length}, "
            f"not {tokens_per_step}"
        )


def hidden_weight_for(
    student: PreTrainedModel, teacher: PreTrainedModel, wanted: float | None
) -> float:
    """The weight of `HealingSettings.hidden_weight` for two models.

    Raises:
        UserError: it was asked for, and hidden states of these cannot be compared layer by layer.
    """
    shapes = [
        (len(model.get_decoder().layers), model.get_input_embeddings().weight.shape[1])
        for model in (student, teacher)
    ]
    if shapes[0] == shapes[1]:
        return HIDDEN_WEIGHT if wanted is None else wanted
    if wanted:
        one, other = (f"{depth} layers of width {width}" for depth, width in shapes)
        raise UserError(
            f"cannot match hidden states: the converted model has {one}, the source {other}; set "
            "`hidden_weight` to 0"
        )
    return 0.0


@contextmanager
def memory_errors(batch_size: int) -> Iterator[None]:
    """Says what to do about too little GPU memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory with {batch_size} sequences per forward pass: "
            "lower `batch_size` or turn `gradient_checkpointing` on; `heal --dry-run` says what "
            "else needs less"
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps the Trainer's bars for checkpoints and warnings about tied weights out of ours."""
    enabled = transformers_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("trainer", "trainer_utils")]
    levels = [logger.level for logger in loggers]
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
