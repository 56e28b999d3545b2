"""Writes the pages options.md and api.md from what the code declares: `python docs/reference.py`.

`tests/test_reference.py` fails while a page and the code differ.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from tpa_convert.cli.commands import app
from tpa_convert.options.declaration import ARGUMENT, PANELS, how_shown

FOLDER = Path(__file__).parent
NOTE = "<!-- Written by docs/reference.py from the code; edit the code. -->\n"

ROOMS = {
    "Commands as functions": ("pipeline", "pipeline.run", "pipeline.export", "pipeline.report"),
    "Options": ("recipe",),
    "Models": ("export.save", "export.dense", "export.llama", "export.inspection"),
    "Families and architectures of your own": ("families", "modeling.tpa_source:AttentionNames"),
    "Converting a model in memory": (
        "sources",
        "calibration.cache_moments:collect_cache_moments",
        "calibration.moments:collect_moments,Moments",
        "plans",
        "conversion.model:convert_model",
        "refinement.least_squares:refit",
        "refinement.adaptation:LayerError",
        "refinement.regression:refine,RefinementSettings",
    ),
    "Healing": ("healing",),
    "Evaluation": ("evaluation", "forward.quantised"),
    "Mathematics": ("coding", "decomposition"),
    "Codes, rows and layers of a model": ("modeling.tpa_codes", "modeling:LayerShape"),
    "Kernels": ("kernels",),
}
"""Titles of the API's page, and below each the modules whose public names it lists."""

HEADING = re.compile(r"(Args|Attributes|Returns|Raises|Yields):\s*(.*)")


def options_page() -> str:
    """Every command with its options, as Markdown."""
    commands: Any = typer.main.get_command(app)
    parts = [
        NOTE,
        "# Options of every command\n",
        "`tpa-convert COMMAND --help` says the same. A recipe (`recipes/`) and the Python API\n"
        "([api.md](api.md)) call an option by its flag without the dashes in front and with\n"
        "underscores: `--kv-ratio` is `kv_ratio`.\n",
    ]
    for name, command in commands.commands.items():
        context = typer.Context(command, info_name=name)
        parts.append(f"## {name}\n")
        parts += [f"{paragraph}\n" for paragraph in paragraphs(command.help)]
        panels: dict[str, list[str]] = {panel: [] for panel in PANELS}
        for parameter in command.get_params(context):
            if parameter.param_type_name == "argument":
                panels[ARGUMENT].append(row(parameter.metavar, parameter.help))
            elif panel := getattr(parameter, "rich_help_panel", None):
                panels[panel].append(row(*parameter.get_help_record(context)))
        for panel, rows in panels.items():
            if rows:
                parts.append("\n".join((f"| {panel} | |", "|---|---|", *rows)) + "\n")
    return "\n".join(parts)


def row(option: str, text: str) -> str:
    """A line of a table of options."""
    option, text = (part.replace("|", "\\|") for part in (option, " ".join(text.split())))
    return f"| `{option}` | {text.replace('<', '&lt;')} |"


def api_page() -> str:
    """The public names of every room, as Markdown."""
    parts = [
        NOTE,
        "# The Python API\n",
        "What stands here is what the package's own commands are made of. Shapes are written in\n"
        "brackets: `[B, T]` is a tensor of B rows and T columns.\n",
    ]
    for title, modules in ROOMS.items():
        parts.append(f"## {title}\n")
        for entry in modules:
            parts += module_parts(entry)
    return "\n".join(parts)


def module_parts(entry: str) -> Iterator[str]:
    """One module: its docstring, then its public functions and classes.

    Args:
        entry: the module below `tpa_convert`, and after a colon the names to show; without them
            all that it exports or, where it does not say, defines.
    """
    path, _, chosen = entry.partition(":")
    yield f"### `tpa_convert.{path}`\n"
    if not chosen:
        yield markdown(importlib.import_module(f"tpa_convert.{path}").__doc__)
    for name, value in members(entry):
        yield f"#### `{name}`\n"
        yield member(value)


def members(entry: str) -> list[tuple[str, Any]]:
    """The functions and classes of an entry of `ROOMS`, by name."""
    path, _, chosen = entry.partition(":")
    module = importlib.import_module(f"tpa_convert.{path}")
    names = chosen.split(",") if chosen else public_names(module)
    found = [(name, getattr(module, name)) for name in names]
    return [(name, v) for name, v in found if inspect.isclass(v) or inspect.isfunction(v)]


def public_names(module: Any) -> list[str]:
    """`__all__`, or the names without an underscore that are defined in this module."""
    return getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def member(value: Any) -> str:
    """A function or a class: signature, docstring, and of a class its public methods."""
    if inspect.isclass(value) and issubclass(value, BaseModel):
        return "\n".join((markdown(value.__doc__), fields(value)))
    parts = [f"```python\n{signature(value)}\n```\n", markdown(own_docstring(value))]
    if inspect.isclass(value):
        for name, method in vars(value).items():
            function = getattr(method, "__func__", method)
            if inspect.isfunction(function) and not name.startswith("_") and function.__doc__:
                first, *_ = paragraphs(function.__doc__)
                parts.append(f"- `{name}{arguments(function)}`: {first}")
        parts.append("")
    return "\n".join(parts)


def fields(section: type[BaseModel]) -> str:
    """The options of a section, in their order."""
    shown = [
        f"`{name}`" if how_shown(field)["panel"] != ARGUMENT else f"`{name}` (argument)"
        for name, field in section.model_fields.items()
    ]
    return f"Options, explained in [options.md](options.md): {', '.join(shown)}.\n"


def signature(value: Any) -> str:
    """What a call looks like; a parameter a line where one line is too short."""
    keyword = "class" if inspect.isclass(value) else "def"
    text = f"{keyword} {value.__name__}{arguments(value)}"
    if len(text) <= 100:
        return text
    inside, returns = re.fullmatch(r"\((.*)\)(.*)", arguments(value)).groups()  # type: ignore[union-attr]
    lines = "".join(f"    {line},\n" for line in split_arguments(inside))
    return f"{keyword} {value.__name__}(\n{lines}){returns}"


def split_arguments(text: str) -> Iterator[str]:
    """The parts between commas that stand in no brackets and no quotation marks."""
    depth, quoted, start = 0, "", 0
    for i, letter in enumerate(text):
        if quoted:
            quoted = "" if letter == quoted else quoted
        elif letter in "'\"":
            quoted = letter
        elif letter == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
        depth += (letter in "([{") - (letter in ")]}") if not quoted else 0
    yield text[start:].strip()


def arguments(value: Any) -> str:
    return str(plain(value)).removesuffix(" -> None")


def plain(value: Any) -> inspect.Signature:
    """A signature whose annotations are as they are written, and whose defaults are the same in
    every process."""
    try:
        found = inspect.signature(value)
    except ValueError:  # of some built-in bases
        return inspect.Signature()
    parameters = [
        parameter.replace(
            annotation=written(parameter.annotation), default=steady(parameter.default)
        )
        for parameter in found.parameters.values()
    ]
    return found.replace(parameters=parameters, return_annotation=written(found.return_annotation))


class Written:
    """Text that stands in a signature without quotation marks."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def written(annotation: Any) -> Any:
    return Written(annotation) if isinstance(annotation, str) else annotation


def steady(default: Any) -> Any:
    """The default without a place in memory."""
    if default is inspect.Parameter.empty or " at 0x" not in repr(default):
        return default
    return Written("...")


def own_docstring(value: Any) -> str | None:
    """None for the one that `dataclass` makes of the fields."""
    text = value.__doc__
    made = dataclasses.is_dataclass(value) and text and text.startswith(f"{value.__name__}(")
    return None if made else text


def paragraphs(text: str | None) -> list[str]:
    """The paragraphs of a docstring, a line each."""
    blocks = inspect.cleandoc(text or "").replace("\b", "").split("\n\n")
    return [" ".join(block.split()) for block in blocks if block.strip()]


def markdown(docstring: str | None) -> str:
    """A docstring as Markdown: lists of arguments become lists, the rest stays."""
    lines = []
    for line in inspect.cleandoc(docstring or "").splitlines():
        if found := HEADING.fullmatch(line):
            lines += [f"**{found[1]}:** {found[2]}".rstrip(), ""]
        elif entry := re.fullmatch(r" {4}(\*{0,2}[\w, *]+): (.*)", line):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif line.startswith(" " * 8) and lines and lines[-1]:
            lines.append("  " + line.strip())
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


PAGES = {"options.md": options_page, "api.md": api_page}


def main() -> None:
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
