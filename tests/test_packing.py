"""Training text as full blocks in which few documents are cut."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_tiny_tokenizer
from tpa_convert.text import tokens as tokens_module
from tpa_convert.text.packing import pack, packed_blocks

TOKENIZER = make_tiny_tokenizer()


def numbered(lengths: list[int]) -> list[np.ndarray]:
    """Documents in which every token is another number."""
    bounds = np.cumsum([0, *lengths])
    return [np.arange(start, stop) for start, stop in pairwise(bounds)]


def uncut(documents: list[np.ndarray], blocks: np.ndarray) -> list[bool]:
    """Whether each document is a whole in some block."""
    places = {token: divmod(i, blocks.shape[1]) for i, token in enumerate(blocks.ravel().tolist())}
    found = []
    for document in documents:
        row, start = places.get(int(document[0]), (-1, -1))
        whole = [(row, start + i) for i in range(len(document))]
        found.append([places.get(token) for token in document.tolist()] == whole)
    return found


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    block_length=st.integers(1, 30),
)
@settings(deadline=None)
def test_packing_fills_whole_blocks(lengths: list[int], block_length: int) -> None:
    documents = numbered(lengths)
    blocks = pack(documents, block_length) if sum(lengths) >= block_length else np.empty((0, 1))
    assert len(blocks) == sum(lengths) // block_length
    tokens = blocks.ravel().tolist()
    assert len(set(tokens)) == len(tokens)  # nothing twice, and less than a block is lost
    assert set(tokens) <= set(range(sum(lengths)))


def test_what_fits_is_not_cut() -> None:
    documents = numbered([7, 3, 6, 4, 5, 5])
    blocks = pack(documents, 10)
    assert all(uncut(documents, blocks))
    assert not all(uncut(documents, np.arange(30).reshape(3, 10)[:, ::-1]))


def test_a_long_document_is_cut_into_full_blocks_and_a_rest() -> None:
    documents = numbered([25, 5])
    blocks = pack(documents, 10)
    assert sorted(map(tuple, blocks)) == [tuple(range(i, i + 10)) for i in (0, 10, 20)]


def test_packing_cuts_few_documents() -> None:
    random = np.random.default_rng(0)
    documents = numbered(random.lognormal(3, 1, 4000).astype(int).clip(2, 100).tolist())
    packed = uncut(documents, pack(documents, 100)).count(False)
    stream = np.concatenate(documents)
    stream = stream[: len(stream) // 100 * 100].reshape(-1, 100)
    assert 10 * packed < uncut(documents, stream).count(False)


def test_documents_end_with_eos_in_an_order_of_the_seed() -> None:
    texts = [chr(97 + i % 26) * 9 for i in range(100)]
    blocks = packed_blocks(texts, TOKENIZER, 20, 5, seed=1)
    assert blocks.dtype == torch.uint16
    assert blocks.shape == (5, 20)
    assert (blocks[:, 9::10].long() == TOKENIZER.eos_token_id).all()
    assert torch.equal(blocks, packed_blocks(texts, TOKENIZER, 20, 5, seed=1))
    assert not torch.equal(blocks, packed_blocks(texts, TOKENIZER, 20, 5, seed=2))


def test_no_more_of_a_stream_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "SHUFFLE_BUFFER", 50)
    reads = 0

    def texts() -> Iterator[dict[str, str]]:
        nonlocal reads
        while True:
            reads += 1
            yield {"text": "x" * 9}

    features = datasets.Features({"text": datasets.Value("string")})
    stream = datasets.IterableDataset.from_generator(texts, features=features)
    assert packed_blocks(stream, TOKENIZER, 20, 5).shape == (5, 20)
    # ten documents, behind the buffer of the shuffle and batches of a hundred rows
    assert 10 <= reads <= 200
