"""Write a converted model in a form that other software runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tpa_convert.dtypes import named_dtype
from tpa_convert.errors import UserError
from tpa_convert.export.dense import to_dense
from tpa_convert.export.gguf import check_tokenizer, write_gguf
from tpa_convert.export.llama import to_llama
from tpa_convert.export.output import atomic_directory, atomic_file, check_file, check_output
from tpa_convert.export.save import copy_licence, load_converted
from tpa_convert.export.stock import check_same_logits, save_stock
from tpa_convert.modeling import source_head_dim, source_key_value_heads
from tpa_convert.options.usage import ExportOptions
from tpa_convert.pipeline.subjects import subjects

FORMS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "llama": to_llama,
    "gguf": to_llama,
    "dense": to_dense,
}


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote.

    Attributes:
        out: directory or file.
        architecture: class of transformers that it is of.
        converted_floats: numbers that the converted model caches per token.
        floats: numbers that the export caches per token.
    """

    out: Path
    architecture: str
    converted_floats: int
    floats: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "out": str(self.out)}


def export(
    directory: str | Path, out: str | Path, options: ExportOptions, *, overwrite: bool = False
) -> ExportResult:
    """Write the model in `directory` as `options` say.

    Args:
        out: a directory; of a GGUF the file.

    Raises:
        UserError: the form cannot hold this model, or `out` cannot be written.
    """
    out = Path(out)
    gguf = options.to == "gguf"
    if gguf and out.suffix != ".gguf":
        raise UserError(f"a GGUF is one file: name it, for instance --out {out}.gguf")
    if gguf:
        check_file(out, overwrite)
    else:
        check_output(out, overwrite)
    model, tokenizer = load_converted(directory, dtype=torch.float32)
    subject = subjects(directory)[0]
    if gguf:
        check_tokenizer(tokenizer, subject.provenance, options.tokenizer_pre)
    exported = FORMS[options.to](model)
    check_same_logits(model, exported)
    dtype = named_dtype(options.dtype) if options.dtype else subject.saved_dtype
    exported = exported.to(dtype)
    config: Any = exported.config
    config.dtype = dtype
    width = source_key_value_heads(config) * source_head_dim(config)
    floats = 2 * width * config.num_hidden_layers
    if gguf:
        with atomic_file(out) as path:
            write_gguf(
                exported, tokenizer, path, subject.provenance, options.tokenizer_pre, out.stem
            )
    else:
        with atomic_directory(out, overwrite) as target:
            save_stock(
                exported, tokenizer, target, out.name, options.to, floats, subject.provenance
            )
            copy_licence(directory, target)
    cached = sum(model.config.cached_floats)
    return ExportResult(out, type(exported).__name__, cached, floats)
