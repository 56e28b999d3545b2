"""Training blocks from several texts, each with its share of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tpa_convert.errors import UserError
from tpa_convert.places.texts import local_files
from tpa_convert.text.packing import packed_blocks
from tpa_convert.text.read import load_documents
from tpa_convert.text.tokens import Documents

Mixture: TypeAlias = dict[str, tuple[Documents, float]]
"""name -> (documents, share)"""


def load_mixture(
    texts: Sequence[tuple[str, float | None]], *, text_column: str = "text"
) -> Mixture:
    """Load texts and settle their shares.

    Args:
        texts: (spec as `load_documents` takes it, its share or None). If no share is given, local
            texts are read as one and so count by their size. Otherwise a missing share is 1; also
            beside Hub datasets, which are streamed and of unknown size.

    Returns:
        The mixture; empty if there are no texts.

    Raises:
        UserError: see `load_documents`.
    """
    if not texts:
        return {}
    names = [name for name, _ in texts]
    unshared = all(share is None for _, share in texts)
    if unshared and (len(names) == 1 or all(local_files(name) is not None for name in names)):
        return {", ".join(names): (load_documents(names, text_column=text_column), 1.0)}
    loaded = {name: load_documents(name, text_column=text_column) for name in names}
    shares = dict.fromkeys(loaded, 0.0)
    for name, share in texts:
        shares[name] += 1.0 if share is None else share
    return {name: (documents, shares[name]) for name, documents in loaded.items()}


def mixture_blocks(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    count: int,
    seed: int = 0,
) -> Tensor:
    """Pack every text of a mixture into its share of `count` blocks.

    Only as much is read of each as is needed. A text that is too short for its share is repeated,
    but for one that is alone.

    Returns:
        Token ids [N, block_length], text by text, uint16 where the vocabulary fits and else int32;
        N is `count`, or less for a single short text.

    Raises:
        UserError: a text is shorter than a block, or its share is.
    """
    if len(mixture) == 1:
        ((documents, _),) = mixture.values()
        return packed_blocks(documents, tokenizer, block_length, count, seed)
    shares = np.array([share for _, share in mixture.values()])
    bounds = np.rint(np.cumsum(shares) / shares.sum() * count).astype(int)
    random = np.random.default_rng(seed)
    result: np.ndarray | None = None
    start = 0
    for (name, (documents, _)), stop in zip(mixture.items(), bounds, strict=True):
        if stop == start:
            raise UserError(
                f"the share of {name} in {count} sequences is less than one: give it a larger "
                "share, or train on more tokens"
            )
        try:
            blocks = packed_blocks(documents, tokenizer, block_length, stop - start, seed).numpy()
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if result is None:
            result = np.empty((count, block_length), blocks.dtype)
        # Every pass takes each block once, the last one a random part of them.
        order = np.resize(random.permutation(len(blocks)), stop - start)
        np.take(blocks, order, axis=0, out=result[start:stop], mode="clip")  # unbuffered
        start = stop
    return torch.from_numpy(result)
