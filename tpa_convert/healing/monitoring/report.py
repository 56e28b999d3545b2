"""What a healing run did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HealingReport:
    """What a run did.

    Attributes:
        steps: optimiser steps of the whole run, with those before it was resumed.
        tokens: tokens of the whole run.
        resumed_from: the step at which this call took over, 0 for a fresh run.
        seconds: wall time of this call.
        tokens_per_second: of this call, without start-up and compilation; None if too short.
        batch_size: sequences per forward pass and device.
        peak_memory_bytes: allocated on the GPU; None on a CPU.
        losses: (step, mean loss in nats per token since the previous entry).
        valid_losses: (step, KL on the held-out blocks in nats per token), if there were any.
        valid_perplexities: (step, the student's perplexity there).
        valid_agreements: (step, share of their tokens at which student and teacher hold the same
            one for the likeliest).
        source_perplexity: the teacher's on the held-out blocks.
        recovered: whether `stop_at` was reached, so that the run ended early.
    """

    steps: int
    tokens: int
    resumed_from: int
    seconds: float
    tokens_per_second: float | None
    batch_size: int
    peak_memory_bytes: int | None
    losses: tuple[tuple[int, float], ...]
    valid_losses: tuple[tuple[int, float], ...]
    valid_perplexities: tuple[tuple[int, float], ...]
    valid_agreements: tuple[tuple[int, float], ...]
    source_perplexity: float | None
    recovered: bool

    @property
    def valid_loss_before(self) -> float | None:
        """The first of `valid_losses`."""
        return self.valid_losses[0][1] if self.valid_losses else None

    @property
    def valid_loss_after(self) -> float | None:
        """The last of `valid_losses`."""
        return self.valid_losses[-1][1] if self.valid_losses else None
