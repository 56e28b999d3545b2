"""Which files of text a user names, if it is not a dataset on the Hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from tpa_convert.errors import UserError

BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")
FORMATS = "txt, md, jsonl, json, csv or parquet, also .gz, .xz, .zst or .bz2"


def local_files(spec: str) -> list[Path] | None:
    """The files a spec names, or None if it can only be a dataset on the Hub."""
    path = Path(spec).expanduser()
    if path.is_file():
        if builder_of(path) is None:
            raise UserError(f"cannot tell the format of {spec}: rename it to one of {FORMATS}")
        return [path]
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if _is_text(f, path)]
        if not files:
            raise UserError(f"no text in {spec}: the directory has no file of type {FORMATS}")
        return files
    if any(character in spec for character in "*?["):
        matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
        files = [f for f in matches if _is_text(f, f.parent)]
        if not files:
            raise UserError(f"no file matches {spec}: check the pattern (files of type {FORMATS})")
        return files
    looks_like_path = spec.startswith((".", "/", "~")) or spec.count("/") > 1
    if looks_like_path or builder_of(path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:.+)?", spec):
        raise UserError(f"no such file: {spec} (check the path)")
    return None


def _is_text(file: Path, directory: Path) -> bool:
    """Whether a file found in a directory is meant: not what systems hide there (`._name`)."""
    hidden = any(part.startswith(".") for part in file.relative_to(directory).parts)
    return not hidden and file.is_file() and builder_of(file) is not None


def builder_of(path: Path) -> str | None:
    """The builder of `datasets` for a file of this name, None if it holds no text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return BUILDERS.get(suffixes[-1]) if suffixes else None
