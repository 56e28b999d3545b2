"""Which source a command means, and on which device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tpa_convert.conversion.probe import probe
from tpa_convert.errors import UserError
from tpa_convert.export.llama import check_source
from tpa_convert.export.stock import stock_class
from tpa_convert.families import family_of
from tpa_convert.options.source import SourceOptions
from tpa_convert.sources import Source, load_source, open_source, read_source_config


def source_options(source: str | SourceOptions) -> SourceOptions:
    """A plain string is a model without a revision."""
    return source if isinstance(source, SourceOptions) else SourceOptions(model=source)


def refuse_other_than_llama(source: str | SourceOptions) -> None:
    """Refuses sources of which no conversion can be a Llama.

    Raises:
        UserError: what is in the way.
    """
    where = source_options(source)
    config = read_source_config(
        where.model, revision=where.revision, trust_remote_code=where.trust_remote_code
    )
    check_source(stock_class(family_of(config).causal_lm), config)


def load(
    source: SourceOptions,
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    on_demand: bool = False,
) -> Source:
    """`load_source` with the options of a recipe, or `open_source`, which reads weights on demand.
    Raises what they raise, and what `probe` does of a model whose family a user has described."""
    config = read_source_config(
        source.model, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
    family = family_of(config)
    if family.registered:
        probe(family, config)
    get = open_source if on_demand else load_source
    return get(
        source.model,
        revision=source.revision,
        dtype=dtype,
        device=usable_device(device),
        trust_remote_code=source.trust_remote_code,
    )


def usable_device(name: str) -> str:
    """The device of this name; `auto` is a GPU if there is one. Raises UserError for others."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used here: try --device cpu") from error
    return name


def source_of(
    directory: str | Path,
    provenance: Mapping[str, Any],
    named: str | SourceOptions | None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Source:
    """The source of a converted model: the one a user names, or else the recorded one.

    The recorded one must be unchanged; a named one may be another model, with a warning.
    """
    if named is None:
        return recorded_source(directory, provenance, device=device, dtype=dtype)
    source = load(source_options(named), device, dtype)
    if source.reference.sha256 != provenance["source"]["sha256"]:
        warn_of_another_source(source, directory, stacklevel=4)
    return source


def recorded_source(
    directory: str | Path,
    provenance: Mapping[str, Any],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Source:
    """The source that a converted model records.

    Raises:
        UserError: it cannot be loaded, or has changed since.
    """
    record = provenance["source"]
    where = SourceOptions(model=record["id"], revision=record["revision"])
    try:
        source = load(where, device, dtype)
    except UserError as error:
        raise UserError(
            f"the source recorded in {directory} cannot be loaded ({error}); name it yourself"
        ) from error
    if source.reference.sha256 != record["sha256"]:
        raise UserError(
            f"{record['id']} has changed since {directory} was converted from it (its weights' "
            "sha256 differs): name the right source, or convert again"
        )
    return source


def warn_of_another_source(source: Source, directory: str | Path, stacklevel: int = 3) -> None:
    warnings.warn(
        f"{source.reference.id} is not the model that {directory} was converted from "
        "(its weights differ)",
        stacklevel=stacklevel,
    )
