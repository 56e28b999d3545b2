"""Several new tokens of each sequence on their way into a cache of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .token_tables import TokenTables


class CodedPrompt(NamedTuple):
    """What attention and its cache need of new tokens.

    Attributes:
        query: rotated, [b, s, h, d].
        keys, values: rows of bytes, uint8 [b, 1, s, bytes], or the room that they are in.
        features: what rows say, of the values and behind them of the keys, in whole words each:
            [b · s, value features + key features]; None where a compiler is at work.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    features: Tensor | None


def code_prompt(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    tables: TokenTables,
    cosine: Tensor,
    sine: Tensor,
    room: tuple[Tensor, Tensor, int] | None = None,
) -> CodedPrompt:
    """Of components of new tokens, for those who know that kernels run it; without gradients.

    Args:
        key, value: components, [b · s, c] each. What keys predict is taken off the values in place.
        query: [b, s, h, d].
        cosine, sine: that queries are rotated by, see `rotation.rotate`; contiguous.
        room: where rows are to go, see `tokens.take_in`.
    """
    given = key.contiguous(), value.contiguous(), query.contiguous()
    if torch.compiler.is_compiling():
        prediction = tables.prediction
        rotated, keys, values = ops.code_prompt(
            *given, cosine, sine, *tables.keys, *tables.values, prediction
        )
        return CodedPrompt(rotated, keys, values, None)
    rotated, keys, values, features = ops.run_prompt(*given, tables, cosine, sine, room)
    return CodedPrompt(rotated, keys, values, features)
