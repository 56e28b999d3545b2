"""The tables of a layer that new tokens are coded by."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .encode_reference import RowCodes


class TokenTables(NamedTuple):
    """What new tokens of one layer are taken in by.

    Attributes:
        keys, values: what codes components.
        prediction: what values take off for features of keys, [width, features in whole words];
            None where they are not predicted.
        launches: what `launch_token` and `launch_prompt` have worked out for these tables.
    """

    keys: RowCodes
    values: RowCodes
    prediction: Tensor | None
    launches: dict[Any, Any]


def token_tables(keys: RowCodes, values: RowCodes, prediction: Tensor | None) -> TokenTables:
    """Of one layer; the prediction is in the type of its weights."""
    prediction = None if prediction is None else prediction.contiguous()
    return TokenTables(keys, values, prediction, {})
