"""Files that hold text: which there are, and what is in them, as it comes from the wild."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
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
        table = _read_json(files, columns) if builder == "json" and columns else None
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
    with no_progress_bars(), tempfile.TemporaryDirectory() as scratch:
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
    """
    values: dict[str, list[Any]] = {name: [] for name in columns}
    found: set[str] = set()
    try:
        for file in files:
            for row in _json_rows(file):
                found |= row.keys()
                for name, column in values.items():
                    value = row.get(name)
                    if isinstance(value, list | dict):
                        value = json.dumps(value, ensure_ascii=False)
                    column.append(value)
        return pa.table({name: pa.array(values[name]) for name in columns if name in found})
    except (ValueError, AttributeError, OSError, pa.ArrowException):
        return None


def _json_rows(file: str) -> Iterator[dict[str, Any]]:
    with io.TextIOWrapper(_opened(file), encoding=ENCODING) as lines:  # type: ignore[type-var]
        text = next(lines, "")
        if text.lstrip().startswith("["):
            yield from json.loads(text + lines.read())
            return
        while text:
            if text.strip():
                yield json.loads(text)
            text = next(lines, "")


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
def no_progress_bars() -> Iterator[None]:
    """Silences the bars of `datasets`."""
    enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
