"""What a healing run is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tpa_convert.errors import UserError
from tpa_convert.healing.monitoring.trackers import check_trackers

HIDDEN_WEIGHT = 10.0


@dataclass(frozen=True)
class HealingSettings:
    """Settings of one healing run.

    Attributes:
        tokens: tokens to train on, rounded up to whole steps. Text shorter than that is read again,
            in a new order.
        block_length: tokens per training sequence (for text; ready-made blocks have their own).
        tokens_per_step: tokens per optimiser step, over all devices.
        batch_size: sequences per forward pass and device, at most; gradients are accumulated over
            the rest of a step. None chooses by the device's memory.
        attention_learning_rate: peak rate of the parameters in attention.
        learning_rate: peak rate of all others.
        warmup_steps: steps over which the rates rise to their peaks, at most a quarter of the run.
            After them, they fall to zero along half a cosine.
        trainable: `all` parameters, those of the `attention` layers only, or with `lora` these and
            low-rank adapters on the MLPs, which end merged into the weights.
        lora_rank: of the adapters.
        skew: share of the source's distribution that is mixed into the student's before they are
            compared, see `objective.skewed_kl`; 0 is the forward KL.
        temperature: softens both distributions of the loss.
        hidden_weight: of the distance between both models' hidden states after each layer (see
            `objective.hidden_distance`) in the first step; it falls to zero along the run. None
            takes HIDDEN_WEIGHT where both have equally many layers of one width, and else 0.
        weight_decay: AdamW's, for matrices only.
        seed: order of the text.
        bf16: autocast to bfloat16 over fp32 weights; None where the GPU supports it.
        torch_compile: compile both models and the loss; None on CUDA only.
        save_steps: steps between checkpoints. An interrupted run also leaves one.
        valid_steps: steps between measurements on held-out text, if there is some.
        stop_at: end early once the student has recovered to within this share of the source's
            perplexity, judged by exp(KL) − 1 on held-out text, which no luck with that text can
            lower; None trains on all tokens.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        log_to: tools that get the run's numbers, `tensorboard` or `wandb`.
        offload_teacher: keep the source's layers in main memory and bring each to the GPU when it
            computes.
    """

    tokens: int = 10_000_000
    block_length: int = 1024
    tokens_per_step: int = 32 * 1024
    batch_size: int | None = None
    attention_learning_rate: float = 6e-4
    learning_rate: float = 1e-4
    warmup_steps: int = 40
    trainable: Literal["all", "attention", "lora"] = "all"
    lora_rank: int = 16
    skew: float = 0.1
    temperature: float = 1.0
    hidden_weight: float | None = None
    weight_decay: float = 0.0
    seed: int = 0
    bf16: bool | None = None
    torch_compile: bool | None = None
    save_steps: int = 500
    valid_steps: int = 100
    stop_at: float | None = None
    gradient_checkpointing: bool = False
    log_to: tuple[str, ...] = ()
    offload_teacher: bool = False

    def __post_init__(self) -> None:
        _require(
            self.trainable in ("all", "attention", "lora"),
            "trainable",
            "all, attention or lora",
            self.trainable,
        )
        check_trackers(self.log_to)
        for name in ("tokens", "tokens_per_step", "save_steps", "valid_steps", "lora_rank"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.block_length >= 2, "block_length", "at least 2", self.block_length)
        if self.stop_at is not None:
            _require(0 < self.stop_at < math.inf, "stop_at", "a positive number", self.stop_at)
        if self.hidden_weight is not None:
            weight = self.hidden_weight
            _require(0 <= weight < math.inf, "hidden_weight", "zero or more", weight)
        if self.batch_size is not None:
            _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        for name in ("attention_learning_rate", "learning_rate", "temperature"):
            value = getattr(self, name)
            _require(0 < value < math.inf, name, "a positive number", value)
        _require(0 <= self.skew < 1, "skew", "zero or more and below one", self.skew)
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, "zero or more", value)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return math.ceil(self.tokens / self.tokens_per_step)


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise UserError(f"{name} must be {expected}, not {value}")
