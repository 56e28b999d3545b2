"""Files that hold text: which there are, and what is in them, as it comes from the wild."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import json
import logging
import lzma
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
from datasets import load_dataset
from datasets.config import ZSTANDARD_AVAILABLE
from datasets.packaged_modules.json.json import JsonConfig

from tpa_convert.errors import UserError

ENCODING = "utf-8-sig"  # a byte-order mark at the beginning, if there is one, is no text
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as Notepad's "Unicode" begins
# Where a column of strings holds even one number, newer versions of `datasets` give all of it as
# JSON, with quotes and escapes, and past the first 10 MB even under the type of strings. None makes
# them refuse such a column, as older versions do.
STRICT_JSON = {"on_mixed_types": None} if hasattr(JsonConfig, "on_mixed_types") else {}


def read_files(
    builder: str, files: Sequence[str], spec: str, columns: Sequence[str] = ()
) -> pa.Table:
    """Read files of one format into memory, decompressing them where needed.

    Args:
        builder: a builder of `datasets`: text, json, csv or parquet. With text, a file is a row.
        spec: what the user named, for error messages.
        columns: what is wanted of json whose other columns do not fit into a table.

    Raises:
        UserError: unreadable or empty files, or a wanted column of json that mixes types.
    """
    if not ZSTANDARD_AVAILABLE and any(file.endswith(".zst") for file in files):
        raise UserError(f"{spec} is compressed with zstd: pip install zstandard")
    try:
        tables = _read_with_builder(builder, files)
    except StopIteration:  # from the builder of json, which looks for a first row
        tables = []
    except Exception as error:  # the builders raise many kinds; all mean: this file cannot be read
        for file in files:
            _refuse_other_encodings(builder, file)
        table = _read_json(files, columns) if builder == "json" else None
        if table is None:
            name, error = _unreadable(builder, files, spec, error)
            reason = str(error.__cause__ or error).strip().split("\n")[0]
            raise UserError(f"cannot read {name} as {builder}: {reason}") from error
        tables = [table]
    if not tables:
        raise UserError(f"no text in {spec}: the file is empty")
    return pa.concat_tables(tables, promote_options="permissive")


def _read_with_builder(builder: str, files: Sequence[str]) -> list[pa.Table]:
    options: dict[str, dict[str, Any]] = {
        "text": {"sample_by": "document"},
        "csv": {"encoding": ENCODING},
        "json": STRICT_JSON,
    }
    # Streaming keeps the data out of the disk cache; only lock files go to the directory.
    with quiet_datasets(), tempfile.TemporaryDirectory() as scratch:
        stream = load_dataset(
            builder,
            # data_files are patterns to `datasets`: a "[" in a file name must not act as one.
            data_files=[glob.escape(file) for file in files],
            split="train",
            streaming=True,
            cache_dir=scratch,
            **options.get(builder, {}),
        )
        tables = list(stream.with_format("arrow").iter(batch_size=1000))
    for table in tables:
        table.validate(full=True)  # the builder of json takes any bytes for text
    return tables


def _unreadable(
    builder: str, files: Sequence[str], spec: str, error: Exception
) -> tuple[str, Exception]:
    """The first of several files that cannot be read by itself, and why; if all can, what the user
    named and why that cannot."""
    for file in files if len(files) > 1 else ():
        try:
            _read_with_builder(builder, [file])
        except StopIteration:  # empty
            continue
        except Exception as alone:
            return file, alone
    return spec, error


def _refuse_other_encodings(builder: str, file: str) -> None:
    """Names a file that is not UTF-8; of many in a directory it may be any."""
    if builder == "parquet":
        return
    decoder, other = codecs.getincrementaldecoder("utf-8")(), "WINDOWS-1252"
    with _opened(file) as stream:
        try:
            while part := stream.read(1 << 20):
                if stream.tell() == len(part) and part.startswith(UTF_16_MARKS):
                    other = "UTF-16"
                decoder.decode(part)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 ({error.reason}): convert it, for example with "
                f"`iconv -f {other} -t UTF-8`, or leave it out"
            ) from error
        except (OSError, EOFError, lzma.LZMAError):
            return  # damaged, as the builder has found out too


def _read_json(files: Sequence[str], columns: Sequence[str]) -> pa.Table | None:
    """The wanted columns of json files, row by row; None where they are no table either.

    Values that are lists or objects become their JSON.

    Raises:
        UserError: a line that is no JSON object, or whose value is of another type than others.
    """
    values: dict[str, list[Any]] = {name: [] for name in columns}
    places: list[str] = []
    found: set[str] = set()
    try:
        for file in files:
            for place, value in _json_values(file):
                row = _row(place, value)
                found |= row.keys()
                places.append(place)
                for name, column in values.items():
                    value = row.get(name)
                    if isinstance(value, list | dict):
                        value = json.dumps(value, ensure_ascii=False)
                    column.append(value)
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError):
        return None
    arrays = {name: _one_type(name, values[name], places) for name in columns if name in found}
    return pa.table(arrays) if arrays else None


def _one_type(name: str, values: list[Any], places: Sequence[str]) -> pa.Array:
    try:
        return pa.array(values)
    except pa.ArrowException as error:
        known = [(type(v), place) for v, place in zip(values, places, strict=True) if v is not None]
        (first, _), *others = known
        place = next((place for kind, place in others if kind is not first), known[0][1])
        raise UserError(
            f"{place}: {name!r} is of another type than before: make it the same in every line"
        ) from error


def _json_values(file: str) -> Iterator[tuple[str, Any]]:
    """What stands in a file with a value a line, or with one list of values, each with its place.

    Raises:
        UserError: a line that is not JSON.
    """
    with io.TextIOWrapper(_opened(file), encoding=ENCODING) as lines:  # type: ignore[type-var]
        number, text = 1, next(lines, "")
        if text.lstrip().startswith("["):
            for row, value in enumerate(_parsed(file, 1, text + lines.read()), start=1):
                yield f"{file}, row {row}", value
            return
        while text:
            if text.strip():
                yield f"{file}, line {number}", _parsed(file, number, text)
            number, text = number + 1, next(lines, "")


def _parsed(file: str, number: int, text: str) -> Any:
    """The JSON of a text that begins in this line of a file."""
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        what = re.sub(r"( starting)? at$", "", error.msg)
        raise UserError(
            f"{file}, line {number + error.lineno - 1}, column {error.colno}: this is not JSON "
            f"({what}): correct the line, or leave it out"
        ) from error


def _row(place: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise UserError(
        f'{place}: this is not a JSON object, such as {{"text": "Once upon a time"}}: '
        "correct it, or leave it out"
    )


def _opened(file: str) -> IO[bytes]:
    """A file's bytes, decompressed."""
    if file.endswith(".zst"):
        import zstandard

        return zstandard.open(file, "rb")
    openers: dict[str, Callable[..., Any]] = {
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".bz2": bz2.open,
    }
    return openers.get(Path(file).suffix.lower(), open)(file, "rb")


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silences the bars and the log of `datasets`: what it cannot read is raised, and told here."""
    enabled = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if enabled:
            datasets.enable_progress_bars()
