"""Imports go one way: the table of docs/architecture.md is the order, and the code keeps to it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tpa_convert"
FLOOR = ("kernels", "decomposition", "modeling")


def documented_order() -> list[str]:
    """Modules in the order of the table, lowest first."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)


def module_of(path: Path) -> str:
    """The row of the table a file belongs to."""
    row = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "cli" if row == "__main__" else row


def absolute_imports(source: str, package: str) -> set[str]:
    """Dotted names that a file imports, wherever in it; `package` resolves relative imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def imports_of(path: Path) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return absolute_imports(path.read_text(encoding="utf-8"), package)


def project_imports(path: Path) -> set[str]:
    """Rows of the table that a file imports, its own left out."""
    rows = {name.split(".")[1] for name in imports_of(path) if name.startswith("tpa_convert.")}
    return rows - {module_of(path), "__version__"}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_the_table_lists_every_module_once() -> None:
    assert sorted(documented_order()) == sorted({module_of(path) for path in FILES})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_come_from_lower_rows(path) -> None:
    order = documented_order()
    allowed = set(order[: order.index(module_of(path))])
    assert project_imports(path) <= (set() if module_of(path) in FLOOR else allowed)


def test_the_exported_model_needs_torch_and_transformers_only() -> None:
    roots = {
        name.split(".")[0]
        for path in (PACKAGE / "modeling").glob("tpa_*.py")
        for name in imports_of(path)
    }
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers", "tpa_convert"}


def test_benchmarks_share_code_through_their_package_only() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        names = absolute_imports(path.read_text(encoding="utf-8"), "")
        assert not scripts & {name.split(".")[0] for name in names}, path


def test_relative_and_nested_imports_are_seen() -> None:
    """The reader of imports itself: an import it missed would make the tests above pass."""
    source = (
        "from ..healing import heal\n"
        "from . import b\n"
        "def f():\n"
        "    from tpa_convert import cli\n"
        "    import tpa_convert.run\n"
    )
    assert absolute_imports(source, "tpa_convert.a") == {
        "tpa_convert.healing.heal",
        "tpa_convert.a.b",
        "tpa_convert.cli",
        "tpa_convert.run",
    }
