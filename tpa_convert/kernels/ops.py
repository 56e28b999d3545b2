"""Decoding and encoding as PyTorch operators, opaque to `torch.compile` and safe in CUDA graphs.

Triton is imported when an operator first runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .encode_reference import CodeTables, RowCodes
from .latent_tables import LatentTables, Layout
from .rows import whole_words
from .token_tables import TokenTables


@functools.cache  # an import statement looks for its module every time
def launches(module: str) -> Any:
    return import_module(module, __package__)


@torch.library.custom_op("tpa_convert::decode_rotated", mutates_args=())
def decode_rotated(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    start: Tensor | None,
    end: Tensor | None,
    window: int | None,
    softcap: float | None,
    key_heads: Tensor | None = None,
    value_heads: Tensor | None = None,
    groups: int = 1,
    pages: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`reference.decode_attention` on the Triton kernels of `split_kv.py`."""
    return run_rotated(
        query,
        keys,
        values,
        scale,
        start,
        end,
        window,
        softcap,
        key_heads,
        value_heads,
        groups,
        pages,
        mask,
    )


def run_rotated(*arguments: Any) -> Tensor:
    """The same, not as an operator."""
    return launches(".launch").launch_rotated(*arguments)


@decode_rotated.register_fake
def _(query, keys, values, *others):
    return query.new_empty(*query.shape[:3], values.shape[-1])


@torch.library.custom_op("tpa_convert::decode_latent", mutates_args=())
def decode_latent(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    layout: Sequence[int],
    epsilon: float,
    chunks: Tensor,
    behind: Tensor,
    items: Tensor,
    weight: Tensor,
    whole: Tensor | None,
    unit: Tensor | None,
    offset: Tensor,
    norm: Tensor | None,
    place_of: Tensor,
    step: Tensor,
    scale: float,
    start: Tensor | None,
    end: Tensor | None,
    window: int | None,
    softcap: float | None,
    mask: Tensor | None,
    pages: Tensor | None,
    by_group: bool,
) -> Tensor:
    """`decode_latent.latent_on_kernel`; what is not of a call is `latent_tables.LatentTables`."""
    of_keys = weight, whole, unit, offset, norm
    constants = epsilon, chunks, behind, items, *of_keys, place_of, step
    tables = LatentTables(Layout(*layout), *constants, {})
    cached = query, keys, values, cosine, sine
    call = scale, start, end, window, softcap, mask, pages, by_group
    return run_latent(*cached, tables, *call)


def run_latent(*arguments: Any) -> Tensor:
    """The same, not as an operator, of `LatentTables`."""
    return launches(".launch_latent").launch_latent(*arguments)


@decode_latent.register_fake
def _(query, keys, values, cosine, sine, layout, epsilon, *others):
    *leading, _ = query.shape
    features, by_group = others[8].shape[1], others[-1]
    if by_group:
        groups = Layout(*layout).groups
        leading = [groups, math.prod(leading) // groups]
    return query.new_empty(*leading, features)


@torch.library.custom_op("tpa_convert::encode", mutates_args=())
def encode(
    x: Tensor,
    mean: Tensor,
    step: Tensor,
    spread: Tensor,
    importance: Tensor,
    reach: Tensor,
    lowest_octave: int,
) -> tuple[Tensor, Tensor]:
    """Headers and codes of components [n, c]; see `encode_reference.CodeTables`."""
    return run_encode(x, CodeTables(mean, step, spread, importance, reach, lowest_octave))


def run_encode(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor]:
    """The same, not as an operator."""
    return launches(".launch_encode").launch_encode(x, tables)


@encode.register_fake
def _(x, *tables):
    return x.new_empty(x.shape[:1], dtype=torch.uint8), x.new_empty(x.shape, dtype=torch.uint8)


@torch.library.custom_op("tpa_convert::encode_rows", mutates_args=())
def encode_rows(
    x: Tensor,
    numbers: Tensor,
    places: Tensor,
    header: int,
    lowest_octave: int,
) -> tuple[Tensor, Tensor]:
    """Rows of bytes [n, bytes] of components [n, c], and what they say, [n,
    `whole_words(c + 1)`]: scaled codes, the class and zeros; see `encode_reference.RowCodes`."""
    return run_rows(x, RowCodes(numbers, places, header, lowest_octave))


def run_rows(x: Tensor, codes: RowCodes) -> tuple[Tensor, Tensor]:
    """The same, not as an operator."""
    return launches(".launch_encode").launch_rows(x, codes)


@encode_rows.register_fake
def _(x, numbers, places, header, lowest_octave):
    rows = x.new_empty((len(x), places.shape[1]), dtype=torch.uint8)
    return rows, x.new_empty((len(x), whole_words(x.shape[1] + 1)))


@torch.library.custom_op("tpa_convert::code_prompt", mutates_args=("value",))
def code_prompt(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    cosine: Tensor,
    sine: Tensor,
    key_numbers: Tensor,
    key_places: Tensor,
    key_header: int,
    key_octave: int,
    value_numbers: Tensor,
    value_places: Tensor,
    value_header: int,
    value_octave: int,
    prediction: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All but the features of `prompts.CodedPrompt`, by the parts of
    `token_tables.TokenTables`."""
    keys = RowCodes(key_numbers, key_places, key_header, key_octave)
    values = RowCodes(value_numbers, value_places, value_header, value_octave)
    tables = TokenTables(keys, values, prediction, {})
    return run_prompt(key, value, query, tables, cosine, sine)[:3]


def run_prompt(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same and the features, not as an operator."""
    return launches(".launch_prompt").launch_prompt(*arguments)


@code_prompt.register_fake
def _(key, value, query, cosine, sine, *tables):
    batch, positions, *_ = query.shape
    key_places, value_places = tables[1], tables[5]
    rows = (
        key.new_empty((batch, 1, positions, places.shape[1]), dtype=torch.uint8)
        for places in (key_places, value_places)
    )
    return query.new_empty(query.shape), *rows


@torch.library.custom_op("tpa_convert::encode_straight", mutates_args=())
def encode_straight(
    x: Tensor,
    mean: Tensor,
    step: Tensor,
    spread: Tensor,
    importance: Tensor,
    reach: Tensor,
    lowest_octave: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled codes of components [n, c], which of them were not clipped, and classes."""
    return run_straight(x, CodeTables(mean, step, spread, importance, reach, lowest_octave))


def run_straight(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor, Tensor]:
    """The same, not as an operator."""
    return launches(".launch_encode").launch_straight(x, tables)


@encode_straight.register_fake
def _(x, *tables):
    inside = x.new_empty(x.shape, dtype=torch.bool)
    return x.new_empty(x.shape), inside, x.new_empty(x.shape[:1], dtype=torch.int64)
