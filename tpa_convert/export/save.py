"""Write a converted model so that plain transformers loads it, with or without this package."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tpa_convert import __version__
from tpa_convert.dtypes import dtype_name, is_finite
from tpa_convert.errors import UserError
from tpa_convert.export.card import render_card
from tpa_convert.export.code import write_own_code
from tpa_convert.export.output import PROVENANCE_FILE, atomic_file
from tpa_convert.families.family import CUSTOM_PAGE
from tpa_convert.places.models import check_converted
from tpa_convert.sources.checkpoint import LICENCES

PACKAGES = ("torch", "transformers", "safetensors", "tensorly", "datasets", "accelerate")

Provenance = dict[str, Any]
"""How a directory was made: source, convert, then perhaps heal and evaluate; JSON-able."""


def stamp() -> dict[str, Any]:
    """Date and versions of a run, to go with its settings."""
    versions = {"python": platform.python_version(), "tpa-convert": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "versions": versions}


def save_converted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    name: str,
    provenance: Mapping[str, Any],
) -> None:
    """Fill a directory: weights, config, tokenizer, modeling code, provenance and card.

    The modeling code and the config's `auto_map` let transformers load the model where this package
    is not installed (`trust_remote_code=True`); with the package installed they are not used.

    Args:
        directory: where to write; it exists.
        name: of the model, for its card.
        provenance: how it was made: `source`, `convert`, and so on.

    Raises:
        UserError: weights are larger than their type can hold.
    """
    for parameter_name, parameter in model.named_parameters():
        check_finite(parameter_name, parameter)
    _save(model, tokenizer, directory, name, provenance, None)


def save_around_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    name: str,
    provenance: Mapping[str, Any],
) -> None:
    """As `save_converted`, but the weights are in the directory already; those of `model` may be
    anywhere."""
    # Elsewhere first: transformers removes shards that it has not written itself.
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        _save(model, tokenizer, Path(folder), name, provenance, {})
        for path in Path(folder).iterdir():
            os.replace(path, directory / path.name)


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    name: str,
    provenance: Mapping[str, Any],
    weights: dict[str, torch.Tensor] | None,
) -> None:
    model.config.auto_map = auto_map(type(model))
    model.save_pretrained(directory, state_dict=weights)
    write_own_code(type(model), directory)
    tokenizer.save_pretrained(directory)
    write_provenance(directory, name, provenance)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor to be written whose numbers its type cannot hold."""
    if not is_finite(tensor):
        raise UserError(
            f"{name} holds numbers that are not finite in {dtype_name(tensor.dtype)}: convert with "
            "--dtype bfloat16"
        )


def copy_licence(source: str | Path, directory: Path) -> None:
    """Files with the terms of a model go along with what is made of it.

    Args:
        source, directory: of the model, and of what is made of it.
    """
    for pattern in LICENCES:
        for path in Path(source).glob(pattern):
            shutil.copyfile(path, directory / path.name)


def auto_map(causal_lm: Any) -> dict[str, str]:
    """Where transformers finds the classes of a converted model in its directory."""
    classes = {
        "AutoConfig": causal_lm.config_class,
        "AutoModel": causal_lm.decoder_class,
        "AutoModelForCausalLM": causal_lm,
    }
    return {
        auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in classes.items()
    }


def load_converted(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a converted model, in eval mode, and its tokenizer. How it was made does not matter.

    Args:
        dtype: of the weights; by default as saved.

    Raises:
        UserError: there is no converted model or no tokenizer in `directory`, or it is damaged.
    """
    model = load_model(directory, dtype=dtype, device=device)
    return model, load_tokenizer(directory)


def load_model(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """`load_converted` without the tokenizer."""
    converted_config(directory)
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype or "auto")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _damaged(directory, error) from error
    return model.to(device).eval()


def converted_config(directory: str | Path) -> PreTrainedConfig:
    """Config of a converted model.

    Raises:
        UserError: there is no converted model, it is damaged, or of a class that is not known here.
    """
    check_converted(directory)
    kind = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8")).get(
        "model_type"
    )
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"{directory} is of an architecture of its own ({kind}): name the file that describes "
            f"it with --import ({CUSTOM_PAGE})"
        )
    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, RuntimeError) as error:
        raise _damaged(directory, error) from error


def _damaged(directory: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{directory} is damaged ({reason}): convert again")


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights of a converted model.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{directory} holds no tokenizer that can be loaded: copy tokenizer.json and "
            "tokenizer_config.json there from the model that it was made from"
        ) from error


def write_provenance(directory: Path, name: str, provenance: Mapping[str, Any]) -> None:
    """Write tpa_convert.json and the model card that follows from it."""
    write_record(directory, provenance)
    with atomic_file(directory / "README.md") as path:
        path.write_text(render_card(name, provenance), encoding="utf-8")


def write_record(directory: Path, provenance: Mapping[str, Any]) -> None:
    """Write tpa_convert.json, without a card."""
    with atomic_file(directory / PROVENANCE_FILE) as path:
        path.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def read_provenance(directory: str | Path) -> Provenance:
    """How `directory` was made.

    Raises:
        UserError: no such directory, or it is not an output of this package.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no such directory: {directory}")
    try:
        return json.loads((directory / PROVENANCE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{directory} is not an output of tpa-convert (no {PROVENANCE_FILE} in it): "
            "make one with `tpa-convert convert`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {directory / PROVENANCE_FILE}: {error}") from None
