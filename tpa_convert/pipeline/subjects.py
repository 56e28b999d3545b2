"""The models that an evaluation compares: converted ones, with or without a record of how they were
made, and any others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.dtypes import named_dtype
from tpa_convert.errors import UserError
from tpa_convert.export.output import PROVENANCE_FILE
from tpa_convert.export.save import (
    Provenance,
    load_model,
    load_tokenizer,
    read_provenance,
)
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline.selection import load
from tpa_convert.places.models import is_converted
from tpa_convert.sources import Source, read_source_config


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        place: what the user named: a directory, a Hub id or a .gguf file.
        directory: of a converted model, None for any other.
        provenance: how a converted model was made. One that was saved again does not say.
    """

    place: str
    directory: Path | None = None
    provenance: Provenance | None = None

    @property
    def saved_dtype(self) -> torch.dtype:
        """Type of the weights as they are saved."""
        if self.directory is None:
            return read_source_config(self.place).dtype or torch.float32
        config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        return named_dtype(config.get("dtype") or config.get("torch_dtype") or "float32")

    @property
    def source_sha256(self) -> str | None:
        """Digest of the source that a converted model records."""
        return self.provenance["source"]["sha256"] if self.provenance else None

    @property
    def kind(self) -> str:
        """A name for its column, as long as no other has the same."""
        if self.provenance is None:
            return Path(self.place).name
        return "healed" if "heal" in self.provenance else "converted"

    @property
    def parts(self) -> tuple[str, ...]:
        """Of its path or Hub id, to tell it from others."""
        path = Path(self.place).expanduser()
        return path.resolve().parts if path.exists() else path.parts

    def load(self, dtype: torch.dtype, device: str) -> PreTrainedModel | Source:
        """A converted model, or a whole source for any other."""
        if self.directory is None:
            return load(SourceOptions(model=self.place), device, dtype)
        return load_model(self.directory, dtype=dtype, device=device)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of a converted model.

        Raises:
            UserError: there is none beside the weights.
        """
        assert self.directory is not None
        return load_tokenizer(self.directory)


def subjects(models: str | Path | Sequence[str | Path]) -> list[Subject]:
    """The models that a user names, each once.

    Raises:
        UserError: a directory that does not exist.
    """
    names = [models] if isinstance(models, str | Path) else models
    found: dict[Any, Subject] = {}
    for name in names:
        path = Path(name).expanduser()
        if is_converted(path):
            directory = path.resolve()
            recorded = (directory / PROVENANCE_FILE).is_file()
            provenance = read_provenance(directory) if recorded else None
            found[directory] = Subject(str(name), directory, provenance)
        else:
            found[str(name)] = Subject(str(name))
    return list(found.values())


def column_names(measured: Sequence[Subject], taken: Sequence[str] = ()) -> list[str]:
    """`converted`, `healed` or the name of the directory where that tells the models apart,
    otherwise the ends of their paths, as short as they can be.

    Args:
        taken: names of other columns.
    """

    def distinct(names: list[str]) -> bool:
        return len({*taken, *names}) == len(taken) + len(names)

    longest = max((len(subject.parts) for subject in measured), default=0)
    ends = ([str(Path(*s.parts[-count:])) for s in measured] for count in range(1, longest + 1))
    numbered = [f"{i}: {subject.place}" for i, subject in enumerate(measured, start=1)]
    return next(filter(distinct, ([s.kind for s in measured], *ends)), numbered)


def refuse_other_vocabularies(models: dict[str, PreTrainedModel]) -> None:
    """Models are compared token by token.

    Raises:
        UserError: one of them has another vocabulary than the first.
    """
    sizes = {name: model.config.get_text_config().vocab_size for name, model in models.items()}
    first, *others = sizes
    for name in others:
        if sizes[name] != sizes[first]:
            raise UserError(
                f"{name} has a vocabulary of {sizes[name]} tokens and {first} one of "
                f"{sizes[first]}: such models cannot be compared token by token; evaluate each "
                "on its own"
            )
