"""How to choose the bits, or the widths, of every layer."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from tpa_convert.options.conversion import CalibrationOptions, KeyOptions
from tpa_convert.options.declaration import METHOD, PLANNING, option
from tpa_convert.options.numbers import Share

Objective = Literal["bytes", "speed"]


class PlanOptions(CalibrationOptions, KeyOptions):
    """How to choose a plan: a budget, or what may be lost."""

    max_increase: Share = option(
        0.1,
        "Without a budget: take the smallest cache whose perplexity, before refinement and "
        "healing, rises by at most this share (0.1 or 10%).",
        PLANNING,
        gt=0,
    )
    objective: Objective = option(
        "bytes",
        "What is to be least: bytes at the accepted loss, or the predicted time of a decoding step "
        "(speed), within the budget if there is one. Time is that of the attention layers at "
        "--context and --batch-size, from bytes, operations and what the GPU at hand, or else an "
        "H100, does of them in a second; a plan slower than the source is not taken. Plans for "
        "speed are of caches in 16 bits, since coded ones decode more slowly than their source.",
        PLANNING,
    )
    memory: float | None = option(
        None,
        "Memory that weights and cache have to share, in GB: shows the largest context of every "
        "plan.",
        PLANNING,
        metavar="GB",
        gt=0,
    )
    batch_size: int = option(
        1, "Sequences cached at once, for the memory and for the time of a step.", PLANNING, ge=1
    )
    context: int = option(
        4096, "Cached tokens at which arithmetic is counted and steps are timed.", PLANNING, ge=1
    )
    multiple_of: int = option(
        8, "Widths measured for a cache in 16 bits are multiples of this.", PLANNING, ge=2
    )
    refine: bool = option(
        False,
        "Refine every candidate before it is measured, for a model that is going to be refined. "
        "Plans are then of caches in 16 bits.",
        METHOD,
    )
    refine_steps: int = option(200, "Steps of that refinement per layer.", METHOD, ge=1)

    def plain_only(self) -> list[str]:
        speed = ["`objective` speed"] if self.objective == "speed" else []
        return super().plain_only() + (["`refine`"] if self.refine else []) + speed

    @model_validator(mode="after")
    def _check(self) -> PlanOptions:
        if len(self.budgets) > 1:
            raise ValueError(
                "give at most one of `kv_floats`, `kv_bytes`, `kv_ratio`; got "
                f"{' and '.join(self.budgets)}"
            )
        if self.calibration_blocks < 2:
            raise ValueError("a plan needs `calibration_blocks` of at least 2: one is held out")
        self.refuse_codes_elsewhere()
        return self
