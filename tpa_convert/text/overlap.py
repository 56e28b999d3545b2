"""Held-out text that is in the training text too measures nothing: find it and say so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from datasets import IterableDataset

from tpa_convert.errors import UserError
from tpa_convert.places.texts import local_files
from tpa_convert.text.read import load_documents
from tpa_convert.text.tokens import Documents, texts_of

# Shorter documents ("Chapter 1", "Thank you.") recur without having been copied.
SHORTEST = 32


def load_local(specs: Sequence[str], *, text_column: str = "text") -> dict[str, Documents]:
    """Documents of the local texts among some, by name; Hub datasets are left out.

    Raises:
        UserError: see `load_documents`.
    """
    local = [spec for spec in specs if local_files(spec) is not None]
    return {spec: load_documents(spec, text_column=text_column) for spec in local}


def refuse_seen_documents(
    training: Mapping[str, Documents | Iterable[str]],
    held_out: Mapping[str, Documents | Iterable[str]],
) -> None:
    """Refuse held-out texts of which documents are in the training text, white space aside.

    Documents under 32 characters do not count, nor do parts of documents. Streams are not read.

    Args:
        training: documents by the name of the text they come from.
        held_out: likewise; documents, or plain strings.

    Raises:
        UserError: says how many documents of the first such text are found, and where.
    """
    tests = {name: set(_digests(documents)) for name, documents in held_out.items()}
    if not any(tests.values()):
        return
    for where, documents in training.items():
        seen = set(_digests(documents))
        for name, digests in tests.items():
            if common := len(seen & digests):
                raise UserError(
                    f"{common:,} of {len(digests):,} documents of {name} are in the training text "
                    f"{where} too, so they cannot measure what training did: take them out of "
                    "either, or name other text"
                )


def _digests(documents: Documents | Iterable[str]) -> Iterator[bytes]:
    if not isinstance(documents, IterableDataset):
        for text in texts_of(documents):
            normal = " ".join(text.split())
            if len(normal) >= SHORTEST:
                yield hashlib.blake2b(normal.encode(errors="replace"), digest_size=16).digest()
