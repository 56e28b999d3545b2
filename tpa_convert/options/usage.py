"""How a converted model is looked at and put to use."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from tpa_convert.options.command_line import CONVERTED, JSON_FILE, OVERWRITE, REPLACED_JSON_FILE
from tpa_convert.options.declaration import (
    MEASURE,
    METHOD,
    OUTPUT,
    REQUIRED,
    SAMPLING,
    SERVING,
    SOURCE,
    FloatType,
    Section,
    Texts,
    option,
)
from tpa_convert.options.evaluation import GenerateOptions

ExportForm = Literal["llama", "gguf", "dense"]


class InspectFiles(Section):
    """What `inspect` reads and writes."""

    directory: Path = CONVERTED
    json_file: Path | None = REPLACED_JSON_FILE


class ExportFiles(Section):
    """What `export` reads and writes."""

    directory: Path = CONVERTED
    out: Path = option(
        REQUIRED,
        "Directory to write; a file that ends in .gguf for --to gguf.",
        OUTPUT,
        flags="--out -o",
        metavar="PATH",
    )
    overwrite: bool = OVERWRITE
    json_file: Path | None = JSON_FILE


class ExportOptions(Section):
    """In which form a converted model is written."""

    to: ExportForm = option(
        REQUIRED,
        "What to write: llama is a plain LlamaForCausalLM with one KV head, as small a cache, and "
        "no code of its own; gguf is the same as a file for llama.cpp; dense is the source's own "
        "class with merged weights, which caches as much as the source.",
        METHOD,
    )
    dtype: FloatType | None = option(
        None,
        "Type of the output's weights.",
        OUTPUT,
        shown_default="that of the converted model",
    )
    tokenizer_pre: str | None = option(
        None,
        "What llama.cpp calls the way in which the tokenizer splits text (llama-bpe, smollm, ...).",
        METHOD,
        metavar="NAME",
        shown_default="recognised, or copied from a GGUF source",
    )


class ServeOptions(Section):
    """How a converted model is served."""

    host: str = option("localhost", "Address to listen on.", SERVING, metavar="ADDRESS")
    port: int = option(8000, "Port to listen on.", SERVING, ge=1, le=65535)
    continuous_batching: bool = option(
        False,
        "Answer requests together, from one paged cache, instead of one after the other.",
        SERVING,
    )
    cache_tokens: int | None = option(
        None,
        "Tokens that the paged cache holds.",
        SERVING,
        ge=1,
        shown_default="what fits on the GPU; 32768 on a CPU",
    )
    batch_tokens: int | None = option(
        None,
        "Tokens that are computed at once with continuous batching.",
        SERVING,
        ge=1,
        shown_default="8192; 1024 on a CPU",
    )
    attention: str | None = option(
        None,
        "Implementation of attention: sdpa, eager, flash_attention_2, ...",
        SERVING,
        metavar="NAME",
        shown_default="sdpa",
    )
    dtype: FloatType | None = option(
        None, "Type to compute in.", SOURCE, shown_default="that of the weights"
    )

    @model_validator(mode="after")
    def _check(self) -> ServeOptions:
        for name in ("cache_tokens", "batch_tokens"):
            if getattr(self, name) is not None and not self.continuous_batching:
                raise ValueError(f"`{name}` goes with `continuous_batching`")
        return self


class ServeFiles(Section):
    """What `serve` works on."""

    directory: Path = CONVERTED


class ChatOptions(GenerateOptions):
    """How a chat goes."""

    max_new_tokens: int = option(512, "Length of an answer, at most.", SAMPLING, ge=1)
    system: str | None = option(
        None, "What the model is told before the chat.", SAMPLING, metavar="TEXT"
    )


class ChatFiles(Section):
    """What `chat` works on."""

    directory: Path = CONVERTED


class ReportFiles(Section):
    """What `report` reads and writes."""

    directory: Path = CONVERTED
    out: Path = option(REQUIRED, "Page to write.", OUTPUT, flags="--out -o", metavar="FILE.html")
    results: Texts = option(
        (),
        "Results that eval --json or bench --json wrote, beside those in the model's card. May be "
        "repeated.",
        MEASURE,
        metavar="FILE",
        reads="file",
    )
    overwrite: bool = option(False, "Replace the file.", OUTPUT)
