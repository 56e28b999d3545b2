"""Options are declared once: the help, the command line, the recipe and the messages follow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pydantic
import pytest
import typer
import typer.testing

from tests.command_line import error_of, tpa_convert
from tpa_convert.cli.commands import app
from tpa_convert.cli.help import Command, with_percent_signs
from tpa_convert.cli.signature import of_sections, spelled
from tpa_convert.cli.terminal import fitted
from tpa_convert.errors import UserError
from tpa_convert.healing import HealingSettings
from tpa_convert.options import command_line, usage
from tpa_convert.options.conversion import ConvertOptions
from tpa_convert.options.declaration import (
    MEASURE,
    PANELS,
    Picture,
    Section,
    Texts,
    how_shown,
    option,
    validated,
)
from tpa_convert.options.evaluation import EvaluateOptions, GenerateOptions
from tpa_convert.options.healing import HealOptions
from tpa_convert.options.messages import expectation
from tpa_convert.options.numbers import Share
from tpa_convert.options.planning import PlanOptions
from tpa_convert.options.recipe import Recipe
from tpa_convert.options.source import DeviceOptions, SourceOptions

IN_RECIPES: list[type[Section]] = [SourceOptions, ConvertOptions, HealOptions, EvaluateOptions]
ALL: list[type[Section]] = [
    *IN_RECIPES,
    PlanOptions,
    GenerateOptions,
    DeviceOptions,
    Recipe,
    *(
        value
        for module in (command_line, usage)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Section) and value is not Section
    ),
]
FIELDS = [(section, name) for section in ALL for name in section.model_fields]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def identifier(value: Any) -> str:
    return value if isinstance(value, str) else value.__name__


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=identifier)
def test_a_field_is_declared_in_full(section: type[Section], name: str) -> None:
    field = section.model_fields[name]
    assert how_shown(field)["panel"] in PANELS
    assert field.description
    assert field.description[0].isupper() or field.description.split()[0] in ("gauge", "0")
    assert field.description.endswith((".", '"" for none.'))


@pytest.mark.parametrize(
    ("command", "sections"),
    [
        ("plan", [SourceOptions, PlanOptions, DeviceOptions]),
        ("convert", [SourceOptions, ConvertOptions, DeviceOptions]),
        ("heal", [HealOptions]),
        ("eval", [EvaluateOptions, DeviceOptions]),
        ("generate", [GenerateOptions, DeviceOptions]),
    ],
)
def test_the_command_line_takes_what_the_sections_declare(
    command: str, sections: list[type[Section]]
) -> None:
    parameters = {parameter.name: parameter for parameter in COMMANDS[command].params}
    for section in sections:
        for name, field in section.model_fields.items():
            default = field.get_default() or None
            shown = parameters[name].default or None
            assert shown == default or (field.is_required() and parameters[name].required), name


class Example(Section):
    """All kinds of fields, named so that the tests below can tell them apart."""

    count: int = option(3, "A count.", MEASURE, ge=1, lt=10)
    share: float | None = option(None, "A share.", MEASURE, gt=0, le=1)
    switch: bool = option(False, "A switch.", MEASURE)
    kept: bool = option(True, "Kept.", MEASURE)
    several: Texts = option((), "Names.", MEASURE, flags="--each -e")
    where: Path | None = option(None, "A place.", MEASURE)
    part: Share = option(0.5, "A part.", MEASURE, gt=0, le=1)
    picture: Picture | None = option(None, "A picture.", MEASURE)


def run_example(*arguments: str) -> Any:
    """The section that a command of its own makes of these arguments."""
    made: list[Example] = []

    def command(example: Example) -> None:
        made.append(example)

    application = typer.Typer(add_completion=False)
    application.command(cls=Command)(of_sections(command))
    result = typer.testing.CliRunner().invoke(application, list(arguments))
    assert result.exit_code == 0, result.output or result.exception
    return made[0]


def test_a_command_is_made_of_a_section() -> None:
    assert run_example() == Example()
    given = ["--count", "4", "--share", "0.5", "--switch", "--no-kept", "--where", "x"]
    assert run_example(*given, "--each", "a", "-e", "b") == Example(
        count=4, share=0.5, switch=True, kept=False, several=("a", "b"), where=Path("x")
    )


@pytest.mark.parametrize("words", [["12.5%"], ["12.5 %"], ["12.5", "%"], ["0.125"]])
def test_a_share_may_be_given_in_percent(words: list[str]) -> None:
    assert run_example("--part", *words).part == 0.125
    assert Example(part="12.5%").part == 0.125  # in a recipe
    assert with_percent_signs(["generate", "small", "%"]) == ["generate", "small", "%"]


def test_every_option_that_is_a_share_takes_percent() -> None:
    """As their help says: no help calls a plain number a share."""
    shares = {
        (section.__name__, name)
        for section, name in FIELDS
        if (field := section.model_fields[name]).description
        and re.search(r"\b[Ss]hare of|this share|total share|percent", field.description)
        and expectation(field) != "a share, such as 0.125 or 12.5%"
    }
    assert {name for _, name in shares} <= {"text"}
    assert expectation(HealOptions.model_fields["stop_at"]) == "a share, such as 0.125 or 12.5%"


def test_options_are_spelt_as_they_were_given() -> None:
    given = ["--count", "4", "--switch", "--no-kept", "--each", "a b", "--each", "c"]
    example = run_example(*given, "--where", "x")
    assert spelled(example, Example.model_fields) == [*given, "--where", "x"]
    assert spelled(example, ["where"]) == ["--where", "x"]
    assert spelled(Example(), Example.model_fields) == []


def test_two_sections_of_a_command_share_no_name() -> None:
    def command(one: Example, other: Example) -> None:
        raise AssertionError("never called")

    with pytest.raises(TypeError, match="two options called count"):
        of_sections(command)


# ------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count must be at least 1 and below 10, not 0"),
        ({"count": 10}, "count must be at least 1 and below 10, not 10"),
        ({"count": "many"}, "count must be a whole number, not many"),
        ({"count": 1.5}, "count must be a whole number, not 1.5"),
        ({"count": None}, "count must be a whole number, not nothing"),
        ({"share": 0}, "share must be above 0 and at most 1, not 0"),
        ({"part": 12.5}, "part must be above 0 and at most 1, such as 0.125 or 12.5%, not 12.5"),
        ({"part": "12.5%%"}, "part must be a share, such as 0.125 or 12.5%, not 12.5%%"),
        ({"part": "200%"}, "part must be above 0 and at most 1, such as 0.125 or 12.5%, not 2.0"),
        ({"picture": "x.gif"}, "picture: a picture ends in .png, .svg, .pdf, not x.gif"),
        ({"share": "half"}, "share must be a number, not half"),
        ({"share": ""}, "share must be a number, not ''"),
        ({"share": float("nan")}, "share must be above 0 and at most 1, not nan"),
        ({"switch": "perhaps"}, "switch must be true or false, not perhaps"),
        ({"several": 3}, "several must be a name or a list of names, not 3"),
        ({"where": True}, "where must be a path, not true"),
        ({"cuont": 3}, "unknown key cuont; did you mean count?"),
    ],
)
def test_a_message_says_what_an_option_takes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Example(**values)
    assert str(caught.value) == message
    with pytest.raises(UserError) as caught:
        validated(Example, values, origin="file.yaml")
    assert str(caught.value) == f"file.yaml: {message}"


def test_sections_inside_of_others_keep_the_place_of_an_error() -> None:
    values = {"source": "m", "convert": {"kv_ratio": 0.5}, "heal": {"text": "a", "tokens": 0}}
    with pytest.raises(UserError, match=r"^heal\.tokens must be at least 1, not 0$"):
        Recipe(**values)
    with pytest.raises(UserError, match=r"^heal must be a mapping with the keys tokens, .*not 3$"):
        Recipe(**{**values, "heal": 3})


PYDANTIC_WORDS = (
    "input should",
    "value error",
    "assertion failed",
    "unable to",
    "validation",
    "pydantic",
    "extra inputs",
    "field required",
)
WRONG = [
    None,
    True,
    -1,
    0,
    1.5,
    float("inf"),
    2**40,
    "",
    "word",
    b"\xff",
    [1],
    {},
    {"a": 1},
    object,
]


def complaints(section: type[Section]) -> list[tuple[str, str]]:
    """Every message that a wrong value of one field of a section gets, and pydantic's own."""
    found = []
    for name in section.model_fields:
        for value in WRONG:
            try:
                section.model_validate({name: value})
            except pydantic.ValidationError as error:
                with pytest.raises(UserError) as caught:
                    validated(section, {name: value})
                found.append((str(caught.value), error.errors()[0]["msg"]))
    return found


@pytest.mark.parametrize("section", ALL, ids=identifier)
def test_no_message_is_in_the_words_of_pydantic(section: type[Section]) -> None:
    found = complaints(section)
    for message, _ in found:
        assert "\n" not in message
        assert not [word for word in PYDANTIC_WORDS if word in message.lower()], message


def test_words_of_pydantic_would_be_seen() -> None:
    """They are in nearly all of its own messages for the same values."""
    own = [message.lower() for section in IN_RECIPES for _, message in complaints(section)]
    seen = [message for message in own if any(word in message for word in PYDANTIC_WORDS)]
    assert len(seen) > 0.9 * len(own) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", ".", "--task", "piqa", "--limit", "0"], "--limit must be at least 1, not 0"),
        (["convert", "x", "--kv-bytes", "many"], "--kv-bytes must be a whole number, not many"),
        (["convert", "x", "--cache-bits", "5"], "--cache-bits must be auto, 16, 8, 4, 3, 2 or 1"),
        (["convert", "x", "--target", "gguf"], "--target must be llama, not gguf"),
        (["bench", ".", "--batch", "0"], "--batch must be whole numbers, each at least 1, not 0"),
        (["eval", ".", "--quantised", "4"], "--quantised is measured on a text: give --text"),
        (["eval", ".", "--revision", "v1"], "--revision is for a source that is named: give --ag"),
        (
            ["heal", ".", "--text", "x", "--out", "x", "--trust-remote-code"],
            "--trust-remote-code is for a source that is named: give --source",
        ),
        (["serve", ".", "--port", "http"], "--port must be a whole number, not http"),
        (["plan", "x", "--memory", "24GB"], "--memory must be a number, not 24GB"),
        (["convert", "x", "--kv-ratio", "a half"], "--kv-ratio must be a share, such as 0.125"),
        (["convert", "x", "--kv-bytes", "0"], "--kv-bytes must be at least 1, not 0"),
        (["heal", ".", "--out", "x"], "there is no text to heal on: give --text, --sampled-tokens"),
        (["plan", "x", "--max-increase", "nan"], "--max-increase must be a positive number"),
    ],
)
def test_messages_name_options_as_the_command_line_spells_them(
    arguments: list[str], message: str
) -> None:
    assert error_of(tpa_convert(*arguments)).startswith(f"error: {message}")


def test_healing_takes_the_section_itself() -> None:
    """No second copy: the options of a recipe are settings, with the defaults of the settings."""
    options = HealOptions(text="a.txt")
    assert isinstance(options, HealingSettings)
    assert {name: getattr(options, name) for name in HealingSettings.model_fields} == dict(
        HealingSettings()
    )


# ------------------------------------------------------------------------------- next steps


@pytest.mark.parametrize("width", [40, 60, 80])
def test_commands_to_copy_break_between_words(width: int) -> None:
    command = (
        '  tpa-convert generate small "Once upon a time" --max-new-tokens 40 --temperature 0.8'
    )
    lines = fitted(command, width).splitlines()
    assert len(lines) > 1
    assert all(len(line) <= width for line in lines)
    assert all(line.endswith(" \\") for line in lines[:-1])
    joined = " ".join(line.strip().removesuffix("\\").strip() for line in lines)
    assert joined == command.strip()
    assert any('"Once upon a time"' in line for line in lines)
    assert not any(line.removesuffix(" \\").endswith(("-tokens", "--top-p")) for line in lines)


def test_words_between_commands_break_without_a_mark() -> None:
    lines = fitted("  Next, a model from the Hub, which takes a while to load.", 30).splitlines()
    assert [line[:2] for line in lines] == ["  "] * len(lines)
    assert not any("\\" in line for line in lines)
    assert fitted("short", 30) == "short"
