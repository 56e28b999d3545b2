"""The texts that perplexity is measured on, as token blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from datasets import Dataset, IterableDataset
from torch import LongTensor
from transformers import PreTrainedTokenizerBase

from tpa_convert.errors import UserError
from tpa_convert.text.read import Text, distinct_names, token_blocks
from tpa_convert.text.tokens import Documents

STREAMED_DOCUMENTS = 10_000  # read from a streamed dataset to look for its sources
MAX_SOURCES = 20  # more are addresses or titles of documents, not corpora to tell apart


def blocks_by_source(
    tokenizer: PreTrainedTokenizerBase,
    texts: Documents | Sequence[Text],
    block_length: int = 1024,
    max_blocks: int = 64,
) -> dict[str, LongTensor]:
    """The first token blocks of each source, int64 [N <= max_blocks, block_length] each.

    The sources of a text are the values of its column `source`. Without that column, and where a
    value has too little text for one block or there are more than 20 values, the text is one source
    with its own name; plain documents are called "text". Of a text in several files the blocks are
    a sample, the same in all runs: the first ones would all be of the first file.

    Raises:
        UserError: a text is empty or too short for one block.
    """
    if isinstance(texts, Dataset | IterableDataset):
        texts = [Text("text", texts)]
    found = [
        (source, f"{text.name}: {source}", blocks)
        for text in texts
        for source, blocks in _source_blocks(tokenizer, text, block_length, max_blocks).items()
    ]
    short, whole, blocks = zip(*found, strict=True)
    return dict(zip(distinct_names(short, whole), blocks, strict=True))


def _source_blocks(
    tokenizer: PreTrainedTokenizerBase, text: Text, block_length: int, max_blocks: int
) -> dict[str, LongTensor]:
    """`blocks_by_source` of one text."""
    seed = 0 if text.several_files else None
    documents = text.documents
    if "source" in (documents.column_names or []):
        if isinstance(documents, IterableDataset):
            documents = Dataset.from_list(list(documents.take(STREAMED_DOCUMENTS)))
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(documents["source"]):
            rows.setdefault(name or "other", []).append(row)
        if len(rows) <= MAX_SOURCES:
            with suppress(UserError):  # too little text of one of them
                return {
                    name: token_blocks(
                        documents.select(part), tokenizer, block_length, max_blocks, seed
                    )
                    for name, part in rows.items()
                }
    try:
        return {text.name: token_blocks(documents, tokenizer, block_length, max_blocks, seed)}
    except UserError as error:
        raise UserError(f"{text.name}: {error}") from error
