"""Files as people have them: byte-order marks, other encodings, hidden files, ragged rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpa_convert.errors import UserError
from tpa_convert.text.read import load_documents

MARK = "\ufeff".encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"words"),
        ("a.md", b"words"),
        ("a.csv", b"text,n\nwords,1\n"),
        ("a.jsonl", b'{"text": "words"}\n'),
        ("a.json", b'[{"text": "words"}]'),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(MARK + content)
    assert list(load_documents(tmp_path / name)["text"]) == ["words"]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(MARK + content))
    assert list(load_documents(tmp_path / f"{name}.gz")["text"]) == ["words"]


def test_a_mark_within_a_text_stays(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(MARK + b"one" + MARK + b"two")
    assert list(load_documents(tmp_path / "a.txt")["text"]) == ["one\ufefftwo"]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".txt.gz"])
def test_the_file_that_is_not_utf_8_is_named(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix.endswith(".gz") else bytes
    good, bad = '{"text": "word"}\n', '{"text": "wörd"}\n'
    if suffix == ".csv":
        good, bad = "text\nword\n", "text\nwörd\n"
    for i in range(3):
        (tmp_path / f"good{i}{suffix}").write_bytes(pack(good.encode()))
    assert len(load_documents(tmp_path)) == 3
    (tmp_path / f"bad{suffix}").write_bytes(pack(bad.encode("cp1252")))
    with pytest.raises(UserError, match=rf"bad{suffix} is not UTF-8 .*iconv") as raised:
        load_documents(tmp_path)
    assert "good" not in str(raised.value)
    (tmp_path / f"bad{suffix}").write_bytes(pack(bad.encode()))
    assert len(load_documents(tmp_path)) == 4


def test_hidden_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("words")
    (tmp_path / "data" / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    (tmp_path / "data" / ".cache").mkdir()
    (tmp_path / "data" / ".cache" / "b.txt").write_text("others")
    assert list(load_documents(tmp_path / "data")["text"]) == ["words"]
    assert list(load_documents(f"{tmp_path}/data/*.txt")["text"]) == ["words"]
    # asked for by name, it is read; and a hidden directory around it all hides nothing
    with pytest.raises(UserError, match="not UTF-8"):
        load_documents(tmp_path / "data" / "._a.txt")
    (tmp_path / "data").rename(tmp_path / ".data")
    assert list(load_documents(tmp_path / ".data")["text"]) == ["words"]


def test_another_column_of_changing_type_does_no_harm(tmp_path: Path) -> None:
    rows = [
        {"text": "one", "id": 1, "source": "a"},
        {"text": "two", "id": "x", "source": "b"},
        {"text": "three", "id": [1], "source": "a"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "b.json"):
        documents = load_documents(tmp_path / name)
        assert list(documents["text"]) == ["one", "two", "three"]
        assert list(documents["source"]) == ["a", "b", "a"]
    rows[1]["text"] = 2  # the text itself must be text
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"c\.jsonl"):
        load_documents(tmp_path / "c.jsonl")


def test_text_in_utf_16_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "notepad.txt").write_text("some text", encoding="utf-16")
    with pytest.raises(UserError, match=r"notepad\.txt is not UTF-8 .*iconv -f UTF-16 "):
        load_documents(tmp_path / "notepad.txt")
    (tmp_path / "latin.txt").write_text("caf\u00e9", encoding="latin-1")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 .*iconv -f WINDOWS-1252 "):
        load_documents(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("name", "content"),
    [("b.jsonl", b'{"text":\n'), ("b.jsonl.gz", b"not gzip"), ("b.parquet", b"PAR1xxxx")],
)
def test_the_file_of_a_directory_that_cannot_be_read_is_named(tmp_path, name, content) -> None:
    for stem in ("a", "c"):
        if name.endswith("parquet"):
            pq.write_table(pa.table({"text": ["some text"]}), tmp_path / f"{stem}.parquet")
        else:
            (tmp_path / f"{stem}.jsonl").write_text('{"text": "some text"}\n')
    assert len(load_documents(tmp_path)) == 2
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"/{name}(, line 1, column 9: | as )") as raised:
        load_documents(tmp_path)
    assert "\n" not in str(raised.value)
