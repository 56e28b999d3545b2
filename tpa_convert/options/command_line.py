"""What only the command line asks for: what a command works on, and which files it writes."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from tpa_convert.options.declaration import (
    ARGUMENT,
    OUTPUT,
    REQUIRED,
    SOURCE,
    TRAINING,
    Picture,
    Section,
    Texts,
    option,
)
from tpa_convert.options.source import SourceAccess, SourceOptions

# Options of several commands.
CONVERTED = option(
    REQUIRED,
    "A converted model (output of convert or heal).",
    ARGUMENT,
    metavar="DIR",
    reads="converted",
)
OVERWRITE = option(False, "Replace an earlier output of tpa-convert.", OUTPUT)
DRY_RUN = option(
    False,
    "Print the plan and the predicted cache, then stop. Reads no weights, writes no model.",
    OUTPUT,
)
JSON_FILE = option(None, "Also write the results to this file.", OUTPUT, flags="--json")
REPLACED_JSON_FILE = option(
    None,
    "Also write the results to this file; one that exists is replaced.",
    OUTPUT,
    flags="--json",
)
PUSH_TO = option(
    None,
    "Also upload the model to this repository of the Hub, NAME or OWNER/NAME, which is made if it "
    "is not there.",
    OUTPUT,
    metavar="REPO",
)
PRIVATE = option(False, "With --push-to: make the repository private.", OUTPUT)


class OwnCode(Section):
    """What every command takes: code that has to run before it."""

    own_code: Texts = option(
        (),
        "Python file to run first: it describes an architecture of your own.",
        SOURCE,
        flags="--import",
        metavar="FILE",
        reads="file",
    )


class PlanFiles(Section):
    """What `plan` writes."""

    out: Path | None = option(
        None, "Plan to write, for `convert --plan`.", OUTPUT, flags="--out -o"
    )
    chart: Picture | None = option(None, "Picture to draw (.png, .svg, .pdf).", OUTPUT)
    overwrite: bool = OVERWRITE
    json_file: Path | None = JSON_FILE


class ConvertFiles(Section):
    """What `convert` writes."""

    out: Path | None = option(
        None,
        "Directory to write; needed unless --dry-run is given. It appears only when it is "
        "complete.",
        OUTPUT,
        flags="--out -o",
        metavar="DIR",
    )
    overwrite: bool = OVERWRITE
    dry_run: bool = DRY_RUN
    profile: bool = option(False, "Show where the time went.", OUTPUT)
    push_to: str | None = PUSH_TO
    private: bool = PRIVATE
    json_file: Path | None = JSON_FILE


class HealFiles(Section):
    """What `heal` reads and writes."""

    directory: Path = CONVERTED
    out: Path | None = option(
        None,
        "Directory to write; needed unless --dry-run is given. It appears only when it is "
        "complete.",
        OUTPUT,
        flags="--out -o",
        metavar="DIR",
    )
    dry_run: bool = option(
        False,
        "Print what the run needs, and what it would need with other options, then stop. Reads no "
        "weights and no text.",
        OUTPUT,
    )
    resume: bool = option(True, "Continue an interrupted run, or start it anew.", TRAINING)
    overwrite: bool = OVERWRITE
    push_to: str | None = PUSH_TO
    private: bool = PRIVATE
    json_file: Path | None = JSON_FILE


class EvalFiles(Section):
    """What `eval` measures and writes."""

    models: tuple[str, ...] = option(
        REQUIRED,
        "One or more models, a column each: directories of converted models, or any model by its "
        "Hub id, directory or .gguf file.",
        ARGUMENT,
        metavar="MODEL...",
        reads="model",
    )
    write_card: bool = option(
        False, "Put the table into the README.md (model card) of each converted model.", OUTPUT
    )
    json_file: Path | None = REPLACED_JSON_FILE


class BenchFiles(Section):
    """What `bench` times and writes."""

    models: tuple[str, ...] = option(
        REQUIRED,
        "One or more models: directories of converted models, or any model by its Hub id, "
        "directory or .gguf file.",
        ARGUMENT,
        metavar="MODEL...",
        reads="model",
    )
    chart: Picture | None = option(None, "Picture to draw (.png, .svg, .pdf).", OUTPUT)
    overwrite: bool = OVERWRITE
    json_file: Path | None = JSON_FILE


class GenerateFiles(Section):
    """What `generate` works on and writes."""

    directory: Path = CONVERTED
    prompt: str = option(REQUIRED, "Text to continue.", ARGUMENT, metavar="PROMPT")
    json_file: Path | None = REPLACED_JSON_FILE


class RunFiles(Section):
    """What `run` works on and writes."""

    recipe: Path = option(REQUIRED, "YAML file; see recipes/.", ARGUMENT, metavar="RECIPE")
    out: Path | None = option(
        None,
        "Directory for the results, instead of the recipe's.",
        OUTPUT,
        flags="--out -o",
        metavar="DIR",
    )
    overwrite: bool = option(False, "Start over and replace earlier results.", OUTPUT)
    dry_run: bool = DRY_RUN
    json_file: Path | None = REPLACED_JSON_FILE


class Teacher(SourceAccess):
    """The model that `heal` learns from."""

    source: str | None = option(
        None,
        "The model to learn from: Hub id, local directory or .gguf file.",
        SOURCE,
        metavar="SOURCE",
        reads="model",
        shown_default="the one that DIR was converted from",
    )

    @model_validator(mode="after")
    def _check(self) -> Teacher:
        _refuse_access_to_none(self, "source")
        return self

    @property
    def model(self) -> SourceOptions | None:
        """None for the recorded one."""
        return _named(self.source, self)


class Reference(SourceAccess):
    """The model that `eval` and `bench` compare with."""

    against: str | None = option(
        None,
        "The source to compare with: Hub id, local directory or .gguf file.",
        SOURCE,
        metavar="SOURCE",
        reads="model",
        shown_default="the one that the models were converted from, if they say",
    )

    @model_validator(mode="after")
    def _check(self) -> Reference:
        _refuse_access_to_none(self, "against")
        return self

    @property
    def model(self) -> SourceOptions | None:
        """None for the recorded one."""
        return _named(self.against, self)


def _refuse_access_to_none(section: SourceAccess, name: str) -> None:
    """Options of a source that is not named would do nothing."""
    if getattr(section, name) is not None:
        return
    for field in SourceAccess.model_fields:
        if getattr(section, field):
            raise ValueError(f"`{field}` is for a source that is named: give `{name}`")


def _named(model: str | None, access: SourceAccess) -> SourceOptions | None:
    if model is None:
        return None
    return SourceOptions(model=model, **access.model_dump(include=set(SourceAccess.model_fields)))
