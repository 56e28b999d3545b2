"""How a converted model is looked at and put to use."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tpa_convert.options.command_line import CONVERTED, JSON_FILE, OVERWRITE, REPLACED_JSON_FILE
from tpa_convert.options.declaration import (
    METHOD,
    OUTPUT,
    REQUIRED,
    FloatType,
    Section,
    option,
)

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
