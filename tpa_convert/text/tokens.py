"""Documents in, their tokens out, in the order of a seed and no more than are wanted."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import TypeAlias, TypeVar

import numpy as np
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tpa_convert.errors import UserError
from tpa_convert.sources.tokenizer import puts_bos
from tpa_convert.text.chat import rendered

Documents: TypeAlias = Dataset | IterableDataset
Array = TypeVar("Array", np.ndarray, Tensor)

# Long documents are handled in pieces, so that tokenising needs little memory and a seeded sample
# of a corpus is not one book. 64 Ki characters are about 16 blocks of 1024 tokens.
PIECE_CHARACTERS = 1 << 16
BATCH_CHARACTERS = 1 << 20
SHUFFLE_BUFFER = 10_000


def token_documents(
    documents: Documents | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    max_blocks: int | None = None,
    seed: int | None = None,
) -> list[np.ndarray]:
    """Tokenise documents; reading stops once `max_blocks` blocks could be filled.

    Returns:
        Token ids [tokens], uint16 where the vocabulary fits and else int32, at least `block_length`
        in all and at most `max_blocks` times as many: the last document is cut to that. Each ends
        with EOS; with a seed they are pieces of at most 64 Ki characters that all do.

    Raises:
        UserError: no text, or too little to fill one block.
    """
    wanted = None if max_blocks is None else max_blocks * block_length
    tokens: list[np.ndarray] = []
    count = 0
    for pieces in _piece_batches(_pieces(documents, tokenizer, seed), wanted):
        for ids in _tokenize(pieces, tokenizer):
            if wanted is not None:
                ids = ids[: wanted - count]
            tokens.append(ids)
            count += len(ids)
            if count == wanted:
                return tokens
    if count < block_length:
        if count == 0:
            raise UserError("no text in the documents: give a file or dataset with text in it")
        raise UserError(
            f"the text has only {count} tokens, fewer than one block of {block_length}: "
            "give more text or a shorter block length"
        )
    return tokens


def begin(blocks: Array, tokenizer: PreTrainedTokenizerBase) -> Array:
    """Blocks [N, L] with the begin-of-text token in the place of their first, if the tokenizer puts
    one before a text: some models predict several times worse without it (Gemma)."""
    if puts_bos(tokenizer):
        blocks[:, 0] = tokenizer.bos_token_id
    return blocks


def _pieces(
    documents: Documents | Iterable[str], tokenizer: PreTrainedTokenizerBase, seed: int | None
) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether a document ends here)."""
    if isinstance(documents, IterableDataset) and seed is not None:
        documents = documents.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for text in texts_of(documents, tokenizer):
            yield from ((piece, True) for piece in _cut(text))
    elif seed is not None:
        pieces = [piece for text in texts_of(documents, tokenizer) for piece in _cut(text)]
        random.Random(seed).shuffle(pieces)
        yield from ((piece, True) for piece in pieces)
    else:
        for text in texts_of(documents, tokenizer):
            *head, last = _cut(text)
            yield from ((piece, False) for piece in head)
            yield last, True


def texts_of(
    documents: Documents | Iterable[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[str]:
    """The texts of documents, empty ones left out; chats by the template of a tokenizer, if given.

    Raises:
        UserError: there are chats, and the tokenizer's template cannot render them.
    """
    if isinstance(documents, Dataset | IterableDataset):
        for batch in documents.iter(batch_size=100):
            chats = batch.get("messages") or [None] * len(batch["text"])
            for text, chat in zip(batch["text"], chats, strict=True):
                if chat and text and tokenizer is not None:
                    yield rendered(chat, tokenizer)
                elif text:
                    yield text
    else:
        yield from (text for text in documents if text)


def _cut(text: str) -> list[str]:
    """Cut a text into pieces of at most PIECE_CHARACTERS, after a line end where there is one."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1
        stop = stop if stop > start else start + PIECE_CHARACTERS
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _piece_batches(
    pieces: Iterable[tuple[str, bool]], wanted_tokens: int | None
) -> Iterator[list[tuple[str, bool]]]:
    """Batches large enough to keep the tokenizer's threads busy, small if few tokens are wanted."""
    limit = BATCH_CHARACTERS if wanted_tokens is None else min(BATCH_CHARACTERS, 4 * wanted_tokens)
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenize(
    pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[np.ndarray]:
    """Token ids [tokens] of each piece, with EOS where a document ends."""
    encoded = tokenizer(
        [text for text, _ in pieces],
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    for ids, (_, end) in zip(encoded, pieces, strict=True):
        yield np.asarray(ids + eos if end else ids, dtype)
