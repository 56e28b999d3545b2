"""How to heal a converted model: on which text, and how to train."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from tpa_convert.options.declaration import (
    BUDGET,
    OUTPUT,
    SOURCE,
    TEXT,
    TRAINING,
    Section,
    Seed,
    Texts,
    as_tuple,
    option,
)
from tpa_convert.options.numbers import Share
from tpa_convert.options.shares import join_shares, split_share

Tracker = Literal["tensorboard", "wandb"]

Mixture = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda v: join_shares(v) if isinstance(v, Mapping) else as_tuple(v)),
]
"""Like Texts, each perhaps with its share of the tokens: `NAME@3`, or {NAME: 3} in YAML."""


# Of the attention layers and of everything else. Coded models begin so near their source that the
# higher rates first lead them away (benchmarks/notes/2026-11-26-coded-cache.md).
RATES, CODED_RATES = (6e-4, 1e-4), (2e-4, 5e-5)


class HealingSettings(Section):
    """How to train: what `healing.heal` takes, whatever it trains on."""

    tokens: int = option(
        10_000_000,
        "Tokens to train on, rounded up to whole steps. Text shorter than that is read again, in a "
        "new order.",
        TRAINING,
        ge=1,
    )
    block_length: int = option(
        1024, "Tokens per sequence (ready-made blocks have their own length).", TRAINING, ge=2
    )
    tokens_per_step: int = option(
        32 * 1024, "Tokens per optimiser step, over all devices.", TRAINING, ge=1
    )
    batch_size: int | None = option(
        None,
        "Sequences per forward pass and device, at most; gradients are accumulated over the rest "
        "of a step.",
        TRAINING,
        shown_default="chosen for the device's memory",
        ge=1,
    )
    attention_learning_rate: float | None = option(
        None,
        "Peak learning rate of the attention layers, which were converted and move most.",
        TRAINING,
        shown_default="6e-4, or 2e-4 for a cache coded in bits",
        gt=0,
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate of everything else. Both fall to zero along half a cosine.",
        TRAINING,
        shown_default="1e-4, or 5e-5 for a cache coded in bits",
        gt=0,
    )
    warmup_steps: int = option(
        40,
        "Steps over which the rates rise to their peaks, at most a quarter of all.",
        TRAINING,
        ge=0,
    )
    trainable: Literal["all", "attention", "lora"] = option(
        "all",
        "Train all parameters, those of the attention layers only, or with lora these and low-rank "
        "adapters on the MLPs, which end merged into the weights.",
        TRAINING,
    )
    lora_rank: int = option(16, "Rank of the adapters.", TRAINING, ge=1)
    skew: Share = option(
        0.1,
        "Share of the source's distribution mixed into the model's before they are compared; 0 is "
        "the plain divergence.",
        TRAINING,
        ge=0,
        lt=1,
    )
    temperature: float = option(1.0, "Softens both distributions of the loss.", TRAINING, gt=0)
    hidden_weight: float | None = option(
        None,
        "Weight of the distance between both models' hidden states after each layer in the first "
        "step; it falls to zero along the run.",
        TRAINING,
        shown_default="10, or 0 for a source of another depth or width",
        ge=0,
    )
    weight_decay: float = option(0.0, "AdamW's weight decay, on matrices only.", TRAINING, ge=0)
    seed: Seed = option(
        0, "Chooses the order of the text; the same seed gives the same result.", SOURCE
    )
    bf16: bool | None = option(
        None,
        "Compute in bfloat16 over float32 weights.",
        TRAINING,
        shown_default="where the GPU can",
    )
    torch_compile: bool | None = option(
        None, "Compile both models and the loss.", TRAINING, shown_default="on a GPU only"
    )
    gradient_checkpointing: bool = option(
        False, "Need less memory, for a quarter more time.", TRAINING
    )
    offload_teacher: bool = option(
        False,
        "Keep the source's layers in main memory, for a source that does not fit beside the rest.",
        TRAINING,
    )
    save_steps: int = option(
        500, "Steps between checkpoints; an interrupted run also leaves one.", TRAINING, ge=1
    )
    valid_steps: int = option(
        100, "Steps between measurements on the held-out text.", TRAINING, ge=1
    )
    # Judged by the divergence, which no luck with the held-out text can lower.
    stop_at: Share | None = option(
        None,
        "Stop early once the divergence on the held-out text stands for at most this rise of "
        "perplexity, exp(KL) − 1, such as 0.02 or 2%.",
        TRAINING,
        gt=0,
    )
    log_to: Annotated[tuple[Tracker, ...], BeforeValidator(as_tuple)] = option(
        (),
        "Also log the run there, for tensorboard in runs/ of the output. May be repeated.",
        OUTPUT,
    )

    def with_rates(self, coded: bool) -> HealingSettings:
        """The same with learning rates where none were given.

        Args:
            coded: whether the model's cache is coded in bits.
        """
        names = ("attention_learning_rate", "learning_rate")
        rates = zip(names, CODED_RATES if coded else RATES, strict=True)
        return self.model_copy(
            update={name: rate for name, rate in rates if getattr(self, name) is None}
        )

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return math.ceil(self.tokens / self.tokens_per_step)


class HealOptions(HealingSettings):
    """How to heal: distil the source into the converted model on plain text."""

    text: Mixture = option(
        (),
        "Text file, directory, glob or Hub dataset to heal on. May be repeated. @3 behind a name "
        "(in YAML, `{essays.jsonl: 3}`) gives its share of the tokens; what is too short for its "
        "share is read again. Without shares, files count by their size, and beside a Hub dataset "
        "all count the same.",
        TEXT,
        metavar="PATH|DATASET",
        reads="text",
    )
    sampled_tokens: int = option(
        0,
        "Tokens of text to sample from the source itself, beside the text or instead of it.",
        TEXT,
        ge=0,
    )
    sampled_chat_tokens: int = option(
        0,
        "Tokens of chats to sample from an instruct source, in its own chat template.",
        TEXT,
        ge=0,
    )
    valid_text: Texts = option(
        (),
        "Held-out text, for the perplexity and divergence shown during healing. May be repeated.",
        TEXT,
        metavar="PATH|DATASET",
        reads="text",
    )
    text_column: str = option("text", "Column of the text in jsonl, parquet and datasets.", TEXT)
    kv_ratio: Share | None = option(
        None,
        "Of a model that caches plain numbers: code its cache in bits first, in this share of the "
        "source's bytes. Needs keys that are latent, or a gauge that is applied.",
        BUDGET,
        shown_default="the cache stays as it is",
        gt=0,
        lt=1,
    )

    @model_validator(mode="after")
    def _check(self) -> HealOptions:
        if not (self.text or self.sampled_tokens or self.sampled_chat_tokens):
            raise ValueError(
                "there is no text to heal on: give `text`, `sampled_tokens` or "
                "`sampled_chat_tokens`"
            )
        if self.stop_at is not None and not self.valid_text:
            raise ValueError("`stop_at` needs held-out text to judge by: give `valid_text`")
        refuse_overlap((name for name, _ in self.text_shares), self.valid_text, "valid_text")
        return self

    @property
    def text_shares(self) -> tuple[tuple[str, float | None], ...]:
        """The names in `text`, each with its share or None."""
        return tuple(split_share(spec) for spec in self.text)


def refuse_overlap(train: Iterable[str], test: Iterable[str], name: str) -> None:
    """Refuses text for measuring that the model is trained or calibrated on.

    Raises:
        ValueError: the same file, or the same dataset, in both.
    """

    def resolved(spec: str) -> str:
        path = Path(spec).expanduser()
        return str(path.resolve()) if path.exists() else spec

    seen = {resolved(spec) for spec in train}
    for spec in test:
        if resolved(spec) in seen:
            raise ValueError(
                f"{spec} is training text and cannot measure what training did: take it out of "
                f"the training text, or name other text in `{name}`"
            )
