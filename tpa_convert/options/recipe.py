"""A run as one validated object: the source, and how to convert, heal and evaluate it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BeforeValidator, model_validator

from tpa_convert.errors import UserError
from tpa_convert.options.conversion import ConvertOptions
from tpa_convert.options.declaration import OUTPUT, REQUIRED, SOURCE, Section, option, validated
from tpa_convert.options.evaluation import EvaluateOptions
from tpa_convert.options.healing import HealOptions, refuse_overlap
from tpa_convert.options.source import DEVICE, SourceOptions


class Recipe(Section):
    """Everything `tpa-convert run` does, in order. Paths are relative to the current directory."""

    source: Annotated[
        SourceOptions, BeforeValidator(lambda v: {"model": v} if isinstance(v, str) else v)
    ] = option(
        REQUIRED,
        "The model to convert; a plain string is short for `{model: string}`.",
        SOURCE,
    )
    convert: ConvertOptions = option(REQUIRED, "How to convert it.", OUTPUT)
    heal: HealOptions | None = option(
        None, "How to heal it; leave it out to stop after the conversion.", OUTPUT
    )
    evaluate: EvaluateOptions | None = option(
        None, "What to measure; leave it out to skip the table.", OUTPUT
    )
    out: Path | None = option(
        None, "Directory for the results; `tpa-convert run --out` takes precedence.", OUTPUT
    )
    device: str = DEVICE
    next_steps: str | None = option(None, "Shown when the run is finished.", OUTPUT)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.evaluate is not None:
            healed_on = [name for name, _ in self.heal.text_shares] if self.heal else []
            train = [*self.convert.calibration, *healed_on]
            # training reads the split `train` of a Hub dataset; local files have only one
            test = [
                spec
                for spec in self.evaluate.text
                if self.evaluate.split == "train" or Path(spec).expanduser().exists()
            ]
            refuse_overlap(train, test, "evaluate.text")
        return self

    def results(self, out: str | Path | None = None) -> Path:
        """The directory for the results.

        Args:
            out: takes precedence over that of the recipe.

        Raises:
            UserError: neither is given.
        """
        directory = out or self.out
        if directory is None:
            raise UserError(
                "the recipe names no output directory: add `out: DIR` or pass --out DIR"
            )
        return Path(directory)


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a YAML recipe.

    Raises:
        UserError: no such file, not YAML, an unknown key, a missing or wrong value.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such recipe: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the recipe {path}: {reason}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys source, convert, heal, ...")
    return validated(Recipe, values, origin=str(path))
