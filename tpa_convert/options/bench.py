"""What to time."""

from __future__ import annotations

from tpa_convert.options.declaration import MEASURE, Counts, Section, option


class BenchOptions(Section):
    """Batches and contexts at which models are timed."""

    batch: Counts = option(
        (), "Sequences at a time. May be repeated.", MEASURE, shown_default="1 and 16"
    )
    context: Counts = option(
        (),
        "Tokens of the prompt of each. May be repeated.",
        MEASURE,
        shown_default="2048 and 8192",
    )
    new_tokens: int = option(32, "Tokens to decode after each prompt.", MEASURE, ge=1)
    repeats: int = option(3, "Repeats, of which the median counts.", MEASURE, ge=1)
    static: bool = option(False, "Decode on static caches, as CUDA graphs on a GPU.", MEASURE)

    fill: bool = option(
        False,
        "Also find the largest batch of each context that decodes, by filling the memory of the "
        "GPU.",
        MEASURE,
    )

    @property
    def batches(self) -> tuple[int, ...]:
        """As asked for, or the default."""
        return self.batch or (1, 16)

    @property
    def contexts(self) -> tuple[int, ...]:
        """As asked for, or the default."""
        return self.context or (2048, 8192)
