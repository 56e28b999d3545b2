"""Documents from files, and token blocks from documents."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from tests.conftest import make_tiny_tokenizer
from tests.conversions import random_blocks
from tpa_convert.errors import UserError
from tpa_convert.text import tokens as tokens_module
from tpa_convert.text.packing import packed_blocks
from tpa_convert.text.read import (
    default_calibration_documents,
    load_documents,
    load_texts,
    token_blocks,
)
from tpa_convert.text.tokens import begin

TEXTS = ["one\n\ntwo\n", 'three, "four"']


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(data)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def encode(suffix: str) -> bytes:
    if suffix == ".txt":
        return "\f".join(TEXTS).encode()
    rows = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".csv":
        return pd.DataFrame(rows).to_csv(index=False).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_every_format_gives_the_same_documents(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    path = tmp_path / f"data{suffix}{compression}"
    path.write_bytes(COMPRESSORS[compression](encode(suffix)))
    documents = load_documents(path)
    assert documents.column_names == ["text"]
    assert list(documents["text"]) == TEXTS


def test_parquet(tmp_path: Path) -> None:
    pd.DataFrame({"text": TEXTS, "source": ["a", "b"]}).to_parquet(tmp_path / "data.parquet")
    documents = load_documents(tmp_path / "data.parquet")
    assert documents[:] == {"text": TEXTS, "source": ["a", "b"]}


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "words"}\n')
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    assert load_documents(tmp_path / "data")["text"][0] == "words"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a.jsonl"]
    assert not cache.exists()


def test_directory_glob_and_odd_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a [1].txt").write_text("first")
    (tmp_path / "sub" / "b.jsonl").write_text('{"text": "second"}\n')
    (tmp_path / "sub" / "weights.bin").write_bytes(b"\0")
    assert sorted(load_documents(tmp_path)["text"]) == ["first", "second"]
    assert list(load_documents(f"{tmp_path}/*.txt")["text"]) == ["first"]
    assert list(load_documents(f"{tmp_path}/a [1].txt")["text"]) == ["first"]


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": "  \n"}, {"text": None}, {"text": ""}, {"text": "kept"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(load_documents(tmp_path / "a.jsonl")["text"]) == ["kept"]


def test_another_text_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "words", "text": "other"}\n')
    assert list(load_documents(tmp_path / "a.jsonl", text_column="body")["text"]) == ["words"]


def test_several_specs_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "news.txt").write_text("n")
    (tmp_path / "mail.jsonl").write_text('{"text": "m", "source": "inbox"}\n')
    documents = load_documents([tmp_path / "news.txt", tmp_path / "mail.jsonl"])
    assert documents[:] == {"text": ["n", "m"], "source": ["news", "inbox"]}


@pytest.mark.parametrize("names", [("a/valid.txt", "b/valid.txt"), ("w.en.txt", "w.de.txt")])
def test_specs_of_the_same_short_name_are_told_apart(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("words")
    assert list(load_documents(paths)["source"]) == list(map(str, paths))


def test_texts_know_of_how_many_files_they_are(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt", "sub/c.txt"):
        (tmp_path / name).write_text("words")
    texts = load_texts([tmp_path / "a.txt", tmp_path / "sub", f"{tmp_path}/sub/b*"])
    assert [text.several_files for text in texts] == [False, True, False]
    assert [text.name for text in texts[:2]] == ["a", "sub"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "no such file"),
        ("a.txt", b"", "no text in"),
        ("a.txt", b" \n\f ", "no text in"),
        ("a.jsonl", b"", "no text in"),
        ("a.jsonl.xz", lzma.compress(b""), "no text in"),
        ("a.csv", b"", "no text in|cannot read"),
        ("a.jsonl", b'{"body": "x"}\n', "no column 'text' .* it has body"),
        ("a.jsonl", b'{"text": [1]}\n', "does not hold text"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": 1}\n',
            r"a\.jsonl, line 2: 'text' is of another type",
        ),
        ("a.jsonl", b'{"text": true}\n{"text": "x"}\n', r"line 2: 'text' is of another type"),
        ("a.json", b'[{"text": "x"}, {"text": 1}]', r"a\.json, row 2: 'text' is of another type"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n\n{"text": 1}', mtime=0),
            "gz, line 3: 'text' is of",
        ),
        (
            "a.jsonl",
            b"not json\n",
            r"a\.jsonl, line 1, column 1: this is not JSON \(Expecting value\)",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"text": "y\n',
            r"line 3, column 10: .* \(Unterminated string\)",
        ),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "line 2: this is not a JSON object"),
        ("a.json", b'[{"text": "x"},\n{"text": }]', "line 2, column 10: this is not JSON"),
        ("a.json", b'[{"text": "x"},\n"y"]', "row 2: this is not a JSON object"),
        ("a.txt", b"\xff\xfe\xff", "a.txt is not UTF-8"),
        ("a.txt.xz", b"\xfd7zXZ\0broken", "cannot read"),
        ("a.parquet", b"PAR1", "cannot read"),
        ("a.doc", b"x", "cannot tell the format"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_documents(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("first", [b'{"text": "x"}\n', b'{"text": "x"}\n{"text": 1}\n'])
def test_strings_and_numbers_in_several_files(tmp_path: Path, first: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(first)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x"}\n{"text": 1}\n')
    with pytest.raises(UserError, match=r"line 2: 'text' is of another type"):
        load_documents(tmp_path)


def test_strings_and_numbers_beyond_what_is_read_at_once(tmp_path: Path) -> None:
    row = json.dumps({"text": "words " * 20_000}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(row * 100 + b'{"text": "x"}\n{"text": 1}\n')
    with pytest.raises(UserError, match=r"line 102: 'text' is of another type"):
        load_documents(tmp_path / "a.jsonl")


def test_json_in_parquet_is_no_text(tmp_path: Path) -> None:
    column = pa.array(['"quoted"', "1"], pa.string()).cast(pa.json_(pa.string()))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="does not hold text"):
        load_documents(tmp_path / "a.parquet")


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text in"):
        load_documents(tmp_path)
    with pytest.raises(UserError, match="no file matches"):
        load_documents(f"{tmp_path}/*.txt")
    with pytest.raises(UserError, match="neither a file here nor a dataset"):
        load_documents("nobody/no-such-dataset")
    with pytest.raises(UserError, match="no text given"):
        load_documents([])


def test_packaged_text_fills_the_default_calibration(tiny_tokenizer) -> None:
    documents = default_calibration_documents()
    assert sum(map(len, documents["text"])) > 100_000


# ------------------------------------------------------------------------------- blocks


def test_documents_are_joined_by_eos(tiny_tokenizer) -> None:
    blocks = token_blocks(["abc", "de", "fgh"], tiny_tokenizer, 3)
    a, eos = tiny_tokenizer("a")["input_ids"][-1], tiny_tokenizer.eos_token_id
    expected = [a, a + 1, a + 2, eos, a + 3, a + 4, eos, a + 5, a + 6]
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == [expected[:3], expected[3:6], expected[6:]]  # "h" is dropped


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    block_length=st.integers(1, 20),
    max_blocks=st.none() | st.integers(1, 6),
    seed=st.none() | st.integers(0, 3),
)
def test_shape(tiny_tokenizer, lengths, block_length, max_blocks, seed) -> None:
    texts = ["x" * length for length in lengths]
    available = sum(length + 1 for length in lengths) // block_length
    if available == 0:
        with pytest.raises(UserError, match="fewer than one block"):
            token_blocks(texts, tiny_tokenizer, block_length, max_blocks, seed)
        return
    blocks = token_blocks(texts, tiny_tokenizer, block_length, max_blocks, seed)
    wanted = available if max_blocks is None else min(available, max_blocks)
    assert blocks.shape == (wanted, block_length)


def test_reading_stops_when_the_blocks_are_full(tiny_tokenizer) -> None:
    def texts() -> Iterator[str]:
        yield from ["x" * 100] * 10
        raise AssertionError("read on after the blocks were full")

    assert token_blocks(texts(), tiny_tokenizer, 8, max_blocks=2).shape == (2, 8)


def test_a_long_document_is_cut_without_a_trace(tiny_tokenizer, monkeypatch) -> None:
    document = "".join(f"line {i}\n" for i in range(50)) + "z" * 300
    whole = token_blocks([document], tiny_tokenizer, 10)
    monkeypatch.setattr(tokens_module, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(tokens_module, "BATCH_CHARACTERS", 200)
    assert torch.equal(token_blocks([document], tiny_tokenizer, 10), whole)


def test_a_seeded_sample_covers_a_long_document(tiny_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokens_module, "PIECE_CHARACTERS", 64)
    document = "a" * 6400 + "b" * 6400
    ids = {name: tiny_tokenizer(name)["input_ids"][-1] for name in "ab"}
    blocks = token_blocks([document], tiny_tokenizer, 64, max_blocks=20, seed=0)
    assert set(ids.values()) <= set(blocks.unique().tolist())
    assert ids["b"] not in token_blocks([document], tiny_tokenizer, 64, max_blocks=20)


@pytest.mark.parametrize("streamed", [False, True])
def test_seed(tiny_tokenizer, streamed: bool) -> None:
    def blocks(seed: int | None) -> list[list[int]]:
        documents = datasets.Dataset.from_dict({"text": [chr(97 + i) * 9 for i in range(20)]})
        return token_blocks(
            documents.to_iterable_dataset() if streamed else documents,
            tiny_tokenizer,
            10,
            seed=seed,
        ).tolist()

    assert blocks(1) == blocks(1)
    assert blocks(1) != blocks(2)
    assert blocks(1) != blocks(None)
    assert sorted(blocks(1)) == sorted(blocks(None))


def test_no_text(tiny_tokenizer) -> None:
    with pytest.raises(UserError, match="no text"):
        token_blocks([""], tiny_tokenizer, 8)


def test_blocks_begin_as_the_tokenizer_begins_a_text() -> None:
    blocks = random_blocks(count=3, length=9)
    assert torch.equal(begin(blocks.clone(), make_tiny_tokenizer()), blocks)
    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    found = begin(blocks.clone(), tokenizer)
    assert found[:, 0].tolist() == [1, 1, 1]
    assert torch.equal(found[:, 1:], blocks[:, 1:])
    text = ["abcdefgh" * 20]
    for cut in (token_blocks, packed_blocks):
        found, plain = cut(text, tokenizer, 16), cut(text, make_tiny_tokenizer(), 16)
        assert found[:, 0].unique().tolist() == [1] != plain[:, 0].unique().tolist()
        assert torch.equal(found[:, 1:], plain[:, 1:])
