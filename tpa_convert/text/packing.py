"""Training text as full blocks in which few documents are cut.

Blocks cut from one long stream of documents start and end in the middle of most of them. Packing
by best fit ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830) keeps whole what fits
into a block. Attention is not masked across the documents of a block, as it was not in the usual
pretraining; they are separated by EOS alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tpa_convert.text.tokens import Documents, begin, token_documents


def packed_blocks(
    documents: Documents | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    max_blocks: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Tokenise documents in a random order and pack them into full blocks.

    Arguments and errors are those of `token_blocks`. Reading stops once `max_blocks` are full.

    Returns:
        Token ids, uint16 where the vocabulary fits and else int32, shape [N, block_length], N >= 1.
    """
    tokens = token_documents(documents, tokenizer, block_length, max_blocks, seed)
    return torch.from_numpy(begin(pack(tokens, block_length), tokenizer))


def pack(documents: Sequence[np.ndarray], block_length: int) -> np.ndarray:
    """Pack tokenised documents into full blocks, most of them uncut.

    Documents longer than a block are cut into full blocks and a rest. Longest first, documents and
    rests go where they leave the least space. The space left in the fullest blocks is then filled
    with the text of the others, which is cut as it comes; less than one block of it is dropped.

    Args:
        documents: token ids [tokens], with at least `block_length` in all.

    Returns:
        Token ids of the same dtype, [N, block_length], N the number of whole blocks of tokens.
    """
    pieces = [
        document[start : start + block_length]
        for document in documents
        for start in range(0, len(document), block_length)
    ]
    blocks, space = _best_fit([len(piece) for piece in pieces], block_length)
    count = sum(map(len, pieces)) // block_length
    fullest = sorted(range(len(blocks)), key=space.__getitem__)
    others = [pieces[i] for block in fullest[count:] for i in blocks[block]]
    filler = np.concatenate(others) if others else pieces[0][:0]
    packed = np.empty((count, block_length), pieces[0].dtype)
    used = 0
    for row, block in zip(packed, fullest, strict=False):
        parts = [pieces[i] for i in blocks[block]]
        np.concatenate([*parts, filler[used : used + space[block]]], out=row)
        used += space[block]
    return packed


def _best_fit(lengths: Sequence[int], capacity: int) -> tuple[list[list[int]], list[int]]:
    """Best-fit decreasing: the items of every bin, in their original order, and its space left."""
    bins: list[list[int]] = []
    space: list[int] = []
    open_bins: dict[int, list[int]] = defaultdict(list)  # by their space
    spaces: list[int] = []  # those of the open bins, sorted
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        at = bisect_left(spaces, lengths[item])
        if at == len(spaces):
            chosen = len(bins)
            bins.append([])
            space.append(capacity)
        else:
            left = spaces[at]
            chosen = open_bins[left].pop()
            if not open_bins[left]:
                del spaces[at]
        bins[chosen].append(item)
        space[chosen] -= lengths[item]
        if left := space[chosen]:
            if not open_bins[left]:
                insort(spaces, left)
            open_bins[left].append(chosen)
    return [sorted(items) for items in bins], space
