"""Text in, token blocks out: documents from files or the Hub, cut into blocks of token ids.

Local files are read through the builders of `datasets` into memory, without its disk cache, so
nothing is written anywhere. Hub datasets are streamed: calibration needs a few hundred documents,
not a download of the whole corpus.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from huggingface_hub import HfApi
from torch import LongTensor
from transformers import PreTrainedTokenizerBase

from tpa_convert.errors import UserError
from tpa_convert.places.texts import builder_of, local_files
from tpa_convert.text.chat import CHAT_COLUMNS, as_chat, packed_chat, plain
from tpa_convert.text.files import quiet_datasets, read_files
from tpa_convert.text.tokens import Documents, begin, token_documents

BYTE_ORDER_MARK = "\ufeff"  # as editors of Windows begin a file


@dataclass(frozen=True)
class Text:
    """What one spec names.

    Attributes:
        name: the short name of the spec; the whole spec where several have the same short name.
        documents: rows with a string column `text` and perhaps a string `source`.
        several_files: whether they come from more than one local file, one after the other.
    """

    name: str
    documents: Documents
    several_files: bool = False


def load_documents(
    spec: str | Path | Sequence[str | Path], *, text_column: str = "text", split: str = "train"
) -> Documents:
    """Load documents as rows with a string column `text` and, where known, a string `source`.

    Chats, in a column `messages` or `conversations` or whichever is asked for, have what is said as
    their `text`, and a column `messages` from which they are rendered with a tokenizer's template.

    Args:
        spec: a local file (txt, md, jsonl, json, csv, parquet, also compressed with .gz, .xz, .zst
            or .bz2), a directory of such files (read recursively), a glob, or a dataset on the Hub
            as "name" or "name:config". A text file is one document, or several separated by form
            feeds. Several specs are concatenated; those without a `source` column are then told
            apart by name.
        text_column: the column that holds the text, or chats.
        split: the split of a Hub dataset; local files have only one.

    Returns:
        An in-memory `Dataset` for local files; a streamed `IterableDataset` for one Hub dataset.
        When files and Hub datasets are mixed, all of them are streamed.

    Raises:
        UserError: missing or unreadable file, unknown dataset, no such column, or no text at all.
    """
    texts = load_texts(spec, text_column=text_column, split=split)
    if len(texts) == 1:
        return texts[0].documents
    parts = [
        text.documents
        if "source" in (text.documents.column_names or [])
        else _with_source(text.documents, text.name)
        for text in texts
    ]
    if any(isinstance(part, IterableDataset) for part in parts):
        parts = [_as_stream(part) for part in parts]
    return datasets.concatenate_datasets(parts)


def load_texts(
    spec: str | Path | Sequence[str | Path], *, text_column: str = "text", split: str = "train"
) -> list[Text]:
    """Like `load_documents`, with the documents of each spec on their own."""
    specs = [str(spec)] if isinstance(spec, str | Path) else list(map(str, spec))
    if not specs:
        raise UserError("no text given: name a file, a directory or a dataset")
    names = distinct_names(list(map(_short_name, specs)), specs)
    return [
        _load_one(one, name, text_column, split) for one, name in zip(specs, names, strict=True)
    ]


def distinct_names(short: Sequence[str], whole: Sequence[str]) -> Sequence[str]:
    """The short names; the whole ones where short names are the same."""
    return short if len(set(short)) == len(short) else whole


def token_blocks(
    documents: Documents | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    max_blocks: int | None = None,
    seed: int | None = None,
) -> LongTensor:
    """Tokenise documents and cut them into blocks; every block is full, the rest is dropped.

    Documents are joined by the EOS token (if the tokenizer has one), and each block begins with the
    begin-of-text token where the tokenizer puts it before a text. Reading and tokenising stop once
    `max_blocks` are full. With a seed the order of the documents is shuffled, and long ones are
    first cut into pieces of 64 Ki characters, so that a small sample covers the corpus; a `Dataset`
    is then read completely (a few seconds for 200 MB), an `IterableDataset` is shuffled in a buffer
    of 10 000 documents.

    Args:
        documents: rows with a `text` column (see `load_documents`), or plain strings.
        block_length: tokens in a block.
        max_blocks: upper limit on the number of blocks; None takes the whole corpus.
        seed: None keeps the order.

    Returns:
        int64 token ids, shape [N, block_length], N >= 1.

    Raises:
        UserError: no text, or too little to fill one block.
    """
    tokens = token_documents(documents, tokenizer, block_length, max_blocks, seed)
    flat = np.concatenate(tokens)
    blocks = len(flat) // block_length
    flat = flat[: blocks * block_length]
    cut = torch.from_numpy(flat).view(blocks, block_length).long()
    return begin(cut, tokenizer)  # type: ignore[return-value]


def default_calibration_documents() -> Dataset:
    """The short text that ships with the package, used when no calibration text is given.

    Raises:
        UserError: the installation lacks the file.
    """
    packaged = resources.files("tpa_convert.text") / "default.txt.xz"
    with resources.as_file(packaged) as path:
        if not path.is_file():
            raise UserError(
                "the packaged calibration text is missing: reinstall tpa-convert, "
                "or name a text with --calibration"
            )
        documents = load_documents(path)
    assert isinstance(documents, Dataset)
    return documents


# ------------------------------------------------------------------------------- loading


def _load_one(spec: str, name: str, text_column: str, split: str) -> Text:
    files = local_files(spec)
    if files is None:
        return Text(name, _load_hub(spec, text_column, split))
    tables: list[pa.Table] = []
    by_builder: dict[str, list[str]] = {}
    for file in files:
        by_builder.setdefault(builder_of(file) or "", []).append(str(file))
    for builder, names in by_builder.items():
        tables.append(_document_table(builder, names, spec, text_column))
    if not all("source" in table.column_names for table in tables):
        tables = [t.select([c for c in t.column_names if c != "source"]) for t in tables]
    documents = Dataset(pa.concat_tables(tables, promote_options="default"))
    if documents.num_rows == 0:
        raise UserError(f"no text in {spec}: give a file with text in it")
    return Text(name, documents, several_files=len(files) > 1)


def _document_table(builder: str, files: list[str], spec: str, text_column: str) -> pa.Table:
    """Documents of one format: an arrow table with `text` and perhaps `messages` and `source`."""
    table = read_files(builder, files, spec, [text_column, *CHAT_COLUMNS, "source"])
    if builder == "text":
        texts = [text.removeprefix(BYTE_ORDER_MARK) for text in table["text"].to_pylist()]
        parts = [part for text in texts for part in text.split("\f")]
        return _nonempty(pa.table({"text": pa.array(parts, pa.large_string())}))
    column = _text_column(text_column, table.column_names, spec)
    try:
        columns = _chat_columns(table[column]) or {"text": _as_strings(table[column])}
        if "source" in table.column_names:
            columns["source"] = _as_strings(table["source"])
        return _nonempty(pa.table(columns))
    except pa.ArrowException as error:
        raise UserError(f"column {column!r} of {spec} does not hold text") from error


def _text_column(wanted: str, columns: Sequence[str], spec: str) -> str:
    """The column with the text; chats count where no text column was asked for."""
    names = [wanted, *(CHAT_COLUMNS if wanted == "text" else ())]
    found = next((name for name in names if name in columns), None)
    if found is None:
        raise UserError(
            f"no column {wanted!r} in {spec}: it has {', '.join(columns)}; "
            "choose one with --text-column"
        )
    return found


def _chat_columns(column: pa.ChunkedArray) -> dict[str, pa.Array] | None:
    """`text` and `messages` of a column of chats; None if the first value is none."""
    first = next((value.as_py() for value in column if value.is_valid), None)
    if as_chat(first) is None:
        return None
    chats = [as_chat(value) for value in column.to_pylist()]
    packed = [packed_chat(chat) for chat in chats if chat]
    return {
        "text": pa.array(list(map(plain, packed)), pa.large_string()),
        "messages": pa.array(packed, pa.large_string()),
    }


def _as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if isinstance(column.type, pa.BaseExtensionType):  # a cast gives what it stores, such as JSON
        raise pa.ArrowTypeError(f"{column.type} is no text")
    return column.cast(pa.large_string())


def _nonempty(table: pa.Table) -> pa.Table:
    return table.filter(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(table["text"])), 0))


def _load_hub(spec: str, text_column: str, split: str) -> IterableDataset:
    name, _, config = spec.partition(":")
    try:
        # One quick request first: without a network `datasets` retries for half a minute.
        HfApi().dataset_info(name, timeout=20)
        with quiet_datasets():
            stream = load_dataset(name, config or None, split=split, streaming=True)
            columns = stream.column_names or list(next(iter(stream)))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{spec} is neither a file here nor a dataset that can be read from the Hub "
            f"({reason}): check the spelling and the connection"
        ) from error
    column = _text_column(text_column, columns, spec)
    wanted = [column, *(["source"] if "source" in columns else [])]
    if as_chat(next(iter(stream.select_columns([column])))[column]) is not None:
        return stream.select_columns(wanted).map(_chat_row, fn_kwargs={"column": column})
    if column != "text":
        stream = stream.remove_columns([c for c in ("text",) if c in columns])
        stream = stream.rename_column(column, "text")
    return stream.select_columns(["text", *wanted[1:]])


def _chat_row(row: dict[str, Any], column: str) -> dict[str, Any]:
    chat = packed_chat(as_chat(row.pop(column)) or [])
    return {**row, "text": plain(chat), "messages": chat}


def _as_stream(documents: Documents) -> IterableDataset:
    """A stream of plain strings: streams of different string types cannot be concatenated."""
    if isinstance(documents, Dataset):
        documents = documents.to_iterable_dataset()
    features = {name: Value("string") for name in documents.column_names or ()}
    return documents.cast(Features(features)) if features else documents


def _with_source(documents: Documents, name: str) -> Documents:
    if isinstance(documents, Dataset):
        column = pa.array([name] * len(documents), pa.large_string())
        return Dataset(documents.data.table.append_column("source", column))
    return documents.map(lambda row: {"source": name})


def _short_name(spec: str) -> str:
    return re.split(r"[.:]", Path(spec).name)[0] or spec
