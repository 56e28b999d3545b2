"""What to measure of a model, and how to try it."""

from __future__ import annotations

from pydantic import model_validator

from tpa_convert.options.declaration import (
    MEASURE,
    SAMPLING,
    SOURCE,
    TEXT,
    Counts,
    Section,
    Seed,
    Texts,
    option,
)
from tpa_convert.options.numbers import Share


class EvaluationSettings(Section):
    """What `evaluation.evaluate` measures beside the perplexity of texts it is given."""

    choices: Texts = option(
        (),
        "Multiple choice, one JSON object {query, choices, gold} a line. May be repeated.",
        MEASURE,
        metavar="FILE",
        reads="file",
    )
    tasks: Texts = option(
        (),
        "Task of lm-evaluation-harness by name. May be repeated. Needs pip install "
        "'tpa-convert[eval]'.",
        MEASURE,
        flags="--task",
    )
    quantised: Counts = option(
        (),
        "Also measure, on the text, the source with its own cache quantised to so many bits (keys "
        "by channel, values by token, as KIVI does): what one would use instead. May be repeated.",
        MEASURE,
        metavar="BITS",
    )
    block_length: int = option(
        1024, "Tokens per sequence of the text, at most the models' context.", MEASURE, ge=2
    )
    max_blocks: int = option(64, "Sequences per text source.", MEASURE, ge=1)
    limit: int | None = option(
        None, "Questions per file and task.", MEASURE, shown_default="all", ge=1
    )
    batch_size: int = option(8, "Sequences per forward pass.", MEASURE, ge=1)
    speed: bool = option(True, "Measure the speed of prefill and decoding.", MEASURE)
    prompt: str | None = option(
        None,
        'Continue this prompt with each model, as a sample; "" for none.',
        MEASURE,
        metavar="TEXT",
        shown_default="the first words of the text",
    )


class EvaluateOptions(EvaluationSettings):
    """What to measure, of the source and of the converted model."""

    text: Texts = option(
        (),
        "Text file, directory, glob or Hub dataset for perplexity. May be repeated.",
        TEXT,
        metavar="PATH|DATASET",
        reads="text",
    )
    text_column: str = option("text", "Column of the text in jsonl, parquet and datasets.", TEXT)
    split: str = option("train", "Split of a Hub dataset; local files have only one.", TEXT)

    @model_validator(mode="after")
    def _check(self) -> EvaluateOptions:
        if self.quantised and not self.text:
            raise ValueError("`quantised` is measured on a text: give `text`")
        return self


class GenerateOptions(Section):
    """How to continue a text."""

    max_new_tokens: int = option(100, "Length of the continuation.", SAMPLING, ge=1)
    temperature: float = option(
        0.0, "0 always takes the likeliest token; 1 samples.", SAMPLING, ge=0
    )
    top_p: Share = option(
        1.0, "Sample from the likeliest tokens of this total share.", SAMPLING, gt=0, le=1
    )
    seed: Seed = option(0, "The same seed gives the same result.", SOURCE)
