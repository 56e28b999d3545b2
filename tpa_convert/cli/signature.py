"""Commands from sections: what a command takes is what its sections declare.

A command is a function of sections. Typer wants a function of single options, which is made here:
its signature holds the fields of all sections, and calling it fills the sections by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from tpa_convert.options.declaration import ARGUMENT, Section, how_shown

METAVARS = {int: "N", float: "X", Path: "FILE", str: "NAME"}


def of_sections(command: Callable[..., None], **others: type[Section]) -> Callable[..., None]:
    """The function of single options that fills the sections which `command` takes.

    Args:
        **others: sections that its signature does not show.
    """
    hints = get_type_hints(command)
    sections: dict[str, Any] = {
        name: hints[name] for name in inspect.signature(command).parameters
    } | others
    parameters: dict[str, inspect.Parameter] = {}
    for section in sections.values():
        for name, field in section.model_fields.items():
            if name in parameters:
                raise TypeError(f"{command.__name__} has two options called {name}")
            parameters[name] = _parameter(name, field)

    def run(**values: Any) -> None:
        filled = {
            name: section(**{field: values[field] for field in section.model_fields})
            for name, section in sections.items()
        }
        command(**filled)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    return run


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """A field as a parameter with Typer's annotation."""
    shown = how_shown(field)
    kind, several = _type_of(field)
    default = inspect.Parameter.empty if field.is_required() else field.get_default()
    # What is no number, or none of the choices, the section tells in words of ours.
    plain: Any = str if kind in (int, float) or get_origin(kind) is Literal else kind
    annotation: Any = list[plain] if several else plain
    if not field.is_required() and (several or default is None):
        annotation, default = annotation | None, None
    settings: dict[str, Any] = {
        "help": field.description,
        "metavar": shown["metavar"] or _metavar(kind),
        "show_default": _visible(default) and not shown["default"],
    }
    if shown["default"]:
        settings["help"] += f" [default: {shown['default']}]"
    if shown["panel"] == ARGUMENT:
        settings["show_default"] = False
        declared = typer.Argument(**settings)
    else:
        flags = shown["flags"].split() or [_flag(name, kind, default)]
        declared = typer.Option(*flags, rich_help_panel=shown["panel"], **settings)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[annotation, declared],
        default=default,
    )


def spelled(section: Section, names: Iterable[str]) -> list[str]:
    """The words of a command line that say those fields of a section which are not as by default.

    Args:
        names: of fields of the section.
    """
    words: list[str] = []
    for name in names:
        field, value = type(section).model_fields[name], getattr(section, name)
        kind, _ = _type_of(field)
        if value is None or value == field.get_default():
            continue
        flag = (how_shown(field)["flags"] or f"--{name.replace('_', '-')}").split()[0]
        if kind is bool:
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [flag, str(one)]
    return words


def _type_of(field: FieldInfo) -> tuple[Any, bool]:
    """The type of one value of a field, and whether there may be several."""
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    several = get_origin(annotation) is tuple
    if several:
        annotation = get_args(annotation)[0]
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
    return annotation, several


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return METAVARS.get(kind, "")  # a switch takes no value


def _flag(name: str, kind: Any, default: Any) -> str:
    """--name, and --no-name beside it for what is on unless it is switched off."""
    spelt = name.replace("_", "-")
    return f"--{spelt}/--no-{spelt}" if kind is bool and default is not False else f"--{spelt}"


def _visible(default: Any) -> bool:
    return default is not None and default is not False and default is not inspect.Parameter.empty
