"""How several new tokens of each sequence are coded: two launches and a product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import shares
from .launch_encode import row_constants
from .quantise import encode_kernel
from .rows import whole_words
from .start import Constants, start_kernel
from .token_tables import TokenTables

NOT_ROTATED = None, None, None, None


class PromptLaunch(NamedTuple):
    """All that calls of one kind have in common.

    Attributes:
        keys, values: constants of the kernel that codes them; that of the keys rotates queries too.
        features: numbers of what rows of values say, and of both.
        made_of: the prediction in the tables that it was made for.
        prediction: the same, [key features, width], in the type of components.
    """

    keys: Constants
    values: Constants
    features: tuple[int, int]
    made_of: Tensor | None
    prediction: Tensor | None


def launch_prompt(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    tables: TokenTables,
    cosine: Tensor,
    sine: Tensor,
    room: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `prompts.CodedPrompt`; all tensors are contiguous."""
    batch, positions, heads, head_dim = query.shape
    kind = key.dtype, query.dtype, cosine.dtype, heads, head_dim
    launch = tables.launches.get(kind)
    if launch is None or launch.made_of is not tables.prediction:
        launch = tables.launches[kind] = prompt_launch(tables, key.device, *kind)
    of_values, of_both = launch.features
    count, rotated = batch * positions, query.new_empty(query.shape)
    features = key.new_empty((count, of_both))
    key_features = features[:, of_values:]
    places = tables.keys.places, tables.values.places
    if room is not None:
        keys, values, slot = room
    else:
        sizes = ((batch, 1, positions, x.shape[1]) for x in places)
        keys, values = (key.new_empty(size, dtype=torch.uint8) for size in sizes)
        slot = 0
    if count:
        programs = shares(count, launch.keys.named["ROWS"])
        rotating = shares(count * heads, launch.keys.named["QUERIES"])
        at = slot * keys.shape[3], keys.stride(0), positions
        numbers = count, count * heads, len(cosine) * positions, *at
        outputs = None, None, key_features, None, None, keys
        given = key, tables.keys.numbers, *outputs, places[0], query, cosine, sine, rotated
        start_kernel(encode_kernel, (programs + rotating, 1, 1), launch.keys, given, numbers)
        if launch.prediction is not None:  # what is not in place would copy first
            value.addmm_(key_features, launch.prediction, alpha=-1)
        programs = shares(count, launch.values.named["ROWS"])
        at = slot * values.shape[3], values.stride(0), positions
        outputs = None, None, features, None, None, values
        coding = value, tables.values.numbers, *outputs, places[1], *NOT_ROTATED
        start_kernel(encode_kernel, (programs, 1, 1), launch.values, coding, (count, 0, 0, *at))
    return rotated, keys, values, features


def prompt_launch(
    tables: TokenTables,
    device: torch.device,
    dtype: torch.dtype,
    query_dtype: torch.dtype,
    table_dtype: torch.dtype,
    heads: int,
    head_dim: int,
) -> PromptLaunch:
    """Of calls whose components are in `dtype`, and queries and cosines in the others."""
    key_features, value_features = (
        whole_words(codes.numbers.shape[1] + 1) for codes in (tables.keys, tables.values)
    )
    of_both = key_features + value_features
    of_queries = (query_dtype, table_dtype), heads, head_dim
    prediction = None
    if tables.prediction is not None:
        # Under autocast normalised queries, whose type tables have, are in another one.
        prediction = tables.prediction.mT.to(dtype)
    return PromptLaunch(
        row_constants(device, dtype, tables.keys, of_both, *of_queries),
        row_constants(device, dtype, tables.values, of_both),
        (value_features, of_both),
        tables.prediction,
        prediction,
    )
