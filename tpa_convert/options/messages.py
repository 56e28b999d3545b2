"""What is wrong with the values of a section, in one sentence of our own.

pydantic says what went wrong inside of it. A user wants to know what the option takes, which
follows from the declaration of the field: whatever pydantic complains about, the message is
"NAME must be WHAT IT TAKES, not WHAT WAS GIVEN".
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tpa_convert.options.numbers import PERCENT

NAMES = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}


def one_line(section: type[BaseModel], error: ValidationError) -> str:
    """The first thing that is wrong, as a sentence without an end mark."""
    # An unknown name often explains the other complaints (a misspelt budget is a missing budget).
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    problem = problems[0]
    path = [part for part in problem["loc"] if isinstance(part, str)]  # not places in a list
    if problem["type"] == "extra_forbidden":
        return _unknown(section, path)
    name, kind = ".".join(path), problem["type"]
    if kind == "missing":
        return f"{name} is missing"
    if kind == "value_error":  # raised by a check of our own
        message = str(problem["ctx"]["error"])
        return f"{name}: {message}" if name else message
    if not path:
        return f"the options must be names with values, not {shown(problem['input'])}"
    expected = expectation(_field_at(section, path), bounds_only=kind in BOUNDS)
    return f"{name} must be {expected}, not {shown(problem['input'])}"


def expectation(field: FieldInfo, bounds_only: bool = False) -> str:
    """What a field takes, in words; of a number that is out of bounds, only the bounds."""
    inner, constraints = _without_none(field.annotation, field.metadata)
    bounds = _bounds(constraints)
    if get_origin(inner) is Literal:
        return _one_of(get_args(inner))
    if get_origin(inner) is tuple:
        item = get_args(inner)[0]
        if get_origin(item) is Literal:
            return _one_of(get_args(item))
        if int in (item, *get_args(item)):
            return "whole numbers, each at least 1"
        return "a name or a list of names"
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        return f"a mapping with the keys {', '.join(inner.model_fields)}"
    if PERCENT in constraints:
        return f"{bounds if bounds_only and bounds else 'a share'}, such as 0.125 or 12.5%"
    if bounds_only:
        return bounds or "a finite number"
    return NAMES.get(inner, "text") if isinstance(inner, type) else "text"


def shown(value: Any) -> str:
    """A value as the user wrote it, as far as one can tell."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if text.strip() else repr(text)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, None for a plain value."""
    inner, _ = _without_none(field.annotation, field.metadata)
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _unknown(section: type[BaseModel], path: list[str]) -> str:
    parent = section
    if path[:-1]:
        parent = section_of(_field_at(section, path[:-1])) or section
    valid = list(parent.model_fields)
    near = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}"
    return f"unknown key {'.'.join(path)}; {hint}"


def _field_at(section: type[BaseModel], path: Sequence[str]) -> FieldInfo:
    *parents, last = path
    for name in parents:
        inner = section_of(section.model_fields[name])
        assert inner is not None
        section = inner
    return section.model_fields[last]


def _without_none(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[Any, list[Any]]:
    """The type itself and what is attached to it, from `Annotated[T, ...] | None` and the like."""
    found = list(metadata)
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            found += more
        elif get_origin(annotation) in (Union, types.UnionType):
            (annotation,) = [a for a in get_args(annotation) if a is not type(None)]
        else:
            return annotation, found


def _bounds(constraints: Sequence[Any]) -> str:
    """zero or more; at least 2; a positive number; above 0 and at most 1; ..."""
    limits = dict(_limits(constraints))
    low, high = "", ""
    if limits.get("ge") == 0:
        low = "zero or more"
    elif "ge" in limits:
        low = f"at least {limits['ge']:g}"
    elif limits.get("gt") == 0 and not {"lt", "le"} & set(limits):
        low = "a positive number"
    elif "gt" in limits:
        low = f"above {limits['gt']:g}"
    if "le" in limits:
        high = f"at most {limits['le']:g}"
    elif "lt" in limits:
        high = f"below {limits['lt']:.10g}"
    return " and ".join(filter(None, (low, high)))


def _limits(constraints: Sequence[Any]) -> Iterator[tuple[str, float]]:
    for constraint in constraints:
        if isinstance(constraint, FieldInfo):
            yield from _limits(constraint.metadata)
        for name, kind in (
            ("ge", annotated_types.Ge),
            ("gt", annotated_types.Gt),
            ("le", annotated_types.Le),
            ("lt", annotated_types.Lt),
        ):
            if isinstance(constraint, kind):
                yield name, getattr(constraint, name)


def _one_of(choices: Sequence[Any]) -> str:
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last
