"""How an option is declared: once, as a field of a section.

A field says everything about its option: default, check, help text, panel of the help, and how the
command line spells it where that is not simply `--field-name`. The command line (`cli.signature`)
and the recipes (`options.recipe`) are made from the fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic.fields import FieldInfo

from tpa_convert.errors import UserError
from tpa_convert.options.messages import one_line

Reads = Literal["model", "converted", "file", "text"]
FloatType = Literal["float32", "bfloat16", "float16"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

REQUIRED: Any = ...
"""The default of an option that has none."""

ARGUMENT = "Arguments"
BUDGET = "How much to cache"
PLANNING = "Planning"
METHOD = "Method"
CALIBRATION = "Calibration"
TEXT = "Text"
TRAINING = "Training"
MEASURE = "What to measure"
SAMPLING = "Sampling"
SERVING = "Serving"
OUTPUT = "Output"
SOURCE = "Model and device"
PANELS = (
    ARGUMENT,
    BUDGET,
    PLANNING,
    METHOD,
    CALIBRATION,
    TEXT,
    TRAINING,
    MEASURE,
    SAMPLING,
    SERVING,
    OUTPUT,
    SOURCE,
)
"""The panels of the help, in the order in which it shows them."""


def option(
    default: Any,
    help_text: str,
    panel: str,
    *,
    flags: str = "",
    metavar: str = "",
    shown_default: str = "",
    reads: Reads | None = None,
    **checks: Any,
) -> Any:
    """A field of a section.

    Args:
        default: REQUIRED for none. With a default of True, the flag has a `--no-` form beside it.
        help_text: whole sentences, for the help of the command line and for readers of the code.
        panel: of the help; one of PANELS. What stands in ARGUMENT has no flag, only a place.
        flags: spellings on the command line, separated by blanks.
        metavar: what the help puts in the place of a value; by default it follows from the type.
        shown_default: in words, where the default itself (None) says nothing.
        reads: what the value names, which has to be there (`named.check_named`): a model by its
            path or Hub id, the directory of a converted model, a file, or text.
        **checks: pydantic's: ge, gt, le, lt, default_factory, ...
    """
    shown: Any = {"panel": panel, "flags": flags, "metavar": metavar, "default": shown_default}
    extra: Any = {"option": shown, "reads": reads}
    return Field(default, description=help_text, json_schema_extra=extra, **checks)


def how_shown(field: FieldInfo) -> dict[str, str]:
    """What `option` was told of the help and the command line: panel, flags, metavar, default."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "declare fields of sections with `option`"
    return cast(dict[str, str], extra["option"])


def what_it_reads(field: FieldInfo) -> Reads | None:
    """What `option` was told that the value of a field names."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "declare fields of sections with `option`"
    return cast(Reads | None, extra["reads"])


class Section(BaseModel):
    """Options that belong together. Unknown names are errors; a section never changes.

    Raises:
        UserError: when a section is made from values that its checks refuse.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(one_line(type(self), error)) from None

    # Sections inside of others are validated without this constructor, as pydantic's own are: an
    # error in them has to keep its place (`heal.seed`).
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


S = TypeVar("S", bound=Section)


def validated(section: type[S], values: Mapping[str, Any], origin: str | None = None) -> S:
    """Make a section of plain values.

    Args:
        origin: where the values come from (a file name), put in front of the message.

    Raises:
        UserError: one line that names the first thing wrong; for an unknown name also the nearest
            valid one.
    """
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        prefix = f"{origin}: " if origin else ""
        raise UserError(prefix + one_line(section, error)) from None


def as_tuple(value: Any) -> Any:
    """One name or several, as YAML and the command line give them."""
    if value is None:
        return ()
    if isinstance(value, str | Path):
        return (str(value),)
    return tuple(str(v) for v in value) if isinstance(value, list | tuple) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
"""One text file, directory, glob or dataset, or several."""


PICTURES = (".png", ".svg", ".pdf")


def _drawable(path: Path) -> Path:
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"a picture ends in {', '.join(PICTURES)}, not {path.name}")
    return path


Picture = Annotated[Path, AfterValidator(_drawable)]
"""A file to draw."""


def _several(value: Any) -> Any:
    """None where the command line was given nothing."""
    return () if value is None else (value,) if isinstance(value, int) else value


Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_several)]
"""One positive number or several."""
