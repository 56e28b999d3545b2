"""Python files of users that describe an architecture: run first, and carried by exports."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from tpa_convert.errors import UserError


def import_file(path: str | Path) -> None:
    """Runs a Python file as a module of its name; what stands beside it can be imported there.

    Raises:
        UserError: there is no such file, or it fails.
    """
    path = Path(path).expanduser().resolve()
    spec = spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file to import")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be imported ({type(error).__name__}: {reason})") from error


def own_files(classes: Iterable[type]) -> list[Path]:
    """The files that define classes which are not transformers' own, and what they import from
    beside them."""
    found: list[Path] = []
    for cls in classes:
        if cls.__module__.partition(".")[0] == "transformers":
            continue
        file = getattr(sys.modules[cls.__module__], "__file__", None)
        if file is None or not Path(file).is_file():
            raise UserError(
                f"{cls.__name__} is defined in no file that an export could carry: put it into one"
            )
        found += [Path(file), *map(Path, get_relative_import_files(file))]
    return list(dict.fromkeys(found))


def warn_of_code_that_cannot_travel(*classes: type) -> None:
    """Says early what would keep an export from loading where this package is not installed."""
    for file in own_files(classes):
        if "tpa_convert" in get_imports(file):
            warnings.warn(
                f"{file.name} defines the model and imports tpa_convert, so that what is converted "
                "loads only where tpa_convert is installed: register the family in another file",
                stacklevel=4,
            )
