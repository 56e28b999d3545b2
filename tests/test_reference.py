"""The pages of options and of the API say what the code declares."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

from tpa_convert.cli.commands import app
from tpa_convert.plans import Budget

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["options.md", "api.md"])
def test_a_page_is_what_the_code_declares(name, reference) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    assert page == reference.PAGES[name](), "write it anew: python docs/reference.py"


def test_a_changed_docstring_is_seen(reference, monkeypatch) -> None:
    """What the comparison above rests on."""
    before = reference.api_page()
    monkeypatch.setattr(Budget, "__doc__", "Something else.")
    assert reference.api_page() != before


def test_every_command_and_every_option_has_its_line(reference) -> None:
    page = reference.options_page()
    for command in app.registered_commands:
        assert f"\n## {command.name or command.callback.__name__}\n" in page
    for flag in (
        "--kv-ratio X",
        "--cache-bits auto\\|16",
        "--text PATH\\|DATASET",
        "--import FILE",
    ):
        assert f"{flag}" in page


def test_a_signature_is_cut_between_its_arguments_only(reference) -> None:
    parts = list(reference.split_arguments("a: dict[str, int] = {}, *, b: str = ', (', c=(1, 2)"))
    assert parts == ["a: dict[str, int] = {}", "*", "b: str = ', ('", "c=(1, 2)"]


def test_everything_public_is_explained(reference) -> None:
    silent = [
        f"{entry}:{name}"
        for modules in reference.ROOMS.values()
        for entry in modules
        for name, value in reference.members(entry)
        if inspect.isfunction(value) and not value.__doc__
    ]
    assert not silent
