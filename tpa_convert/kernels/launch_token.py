"""How one new token of each of a few sequences is taken in: projections, codes and rows of keys and
values, and rotated queries, in one call and without a tensor that only kernels would see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .encode_reference import RowCodes
from .launch import shares
from .launch_encode import FEW, row_constants
from .launch_products import Launch, product_launch, projections_launch
from .quantise import encode_kernel
from .rows import whole_words
from .start import Calls, laid_out
from .token_tables import TokenTables

MOST_LAUNCHES = 64  # that are kept of a layer: numbers of sequences
# What the kernels' arguments are called here: tensors of the tables, tensors and numbers of a call.
TABLES = "key_numbers", "key_places", "value_numbers", "value_places", "prediction"
TENSORS = (
    "states",
    *("query_weight", "key_weight", "value_weight"),
    *("query_bias", "key_bias", "value_bias"),
    *("cosine", "sine", "rotated", "key_rows", "value_rows"),
)
NUMBERS = (
    *("rows", "query_rows", "table_rows"),
    *("key_first", "key_stride", "value_first", "value_stride"),
)
NOTHING = dict.fromkeys(("header", "codes", "inside", "label"), "nothing")
UNROTATED = dict.fromkeys(("query", "cosine", "sine", "rotated"), "nothing")
NO_QUERIES = dict.fromkeys(("query_rows", "table_rows"), "no_rows")
SAME = {"nothing": None, "no_rows": 0, "one": 1}
ALONE = {"together": "one"}  # rows, each of a sequence of its own


class TokenLaunch(NamedTuple):
    """All that calls of one kind have in common.

    Attributes:
        tables: tensors of the tables that it was made for.
        project: of the kernel that projects, where queries are normalised behind it.
        calls: of the others.
        scratch: bytes of all that they write but rotated queries and rows.
        rows: bytes of a row of keys and of values.
    """

    tables: tuple[Tensor | None, ...]
    project: Calls | None
    calls: Calls
    scratch: int
    rows: tuple[int, int]


def tensors_of(tables: TokenTables) -> tuple[Tensor | None, ...]:
    """By the names in `TABLES`."""
    return *tables.keys[:2], *tables.values[:2], tables.prediction


def launch_token(
    states: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    tables: TokenTables,
    cosine: Tensor,
    sine: Tensor,
    head_dim: int,
    normalise: Callable[[Tensor], Tensor] | None = None,
    room: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `tokens.take_in`; all tensors are contiguous."""
    batch, heads = len(states), len(weights[0]) // head_dim
    biased = biases[0] is not None, biases[1] is not None, biases[2] is not None
    kind: tuple[Any, ...] = (
        states.shape,
        head_dim,
        biased,
        len(cosine),
        cosine.dtype,
        normalise is None,
    )
    of_tables = tensors_of(tables)
    launch = tables.launches.get(kind)
    if launch is None or not all(map(is_, launch.tables, of_tables)):
        launch = token_launch(states, weights, tables, cosine, *kind)
        if len(tables.launches) >= MOST_LAUNCHES:
            tables.launches.clear()
        tables.launches[kind] = launch
    scratch = states.new_empty(launch.scratch, dtype=torch.uint8)
    rotated = states.new_empty((batch, heads, 1, head_dim))
    key_bytes, value_bytes = launch.rows
    if room is not None:
        keys, values, slot = room
    else:
        keys = states.new_empty((batch, 1, 1, key_bytes), dtype=torch.uint8)
        values = states.new_empty((batch, 1, 1, value_bytes), dtype=torch.uint8)
        slot = 0
    tensors = states, *weights, *biases, cosine, sine, rotated, keys, values
    rows = slot * key_bytes, keys.stride(0), slot * value_bytes, values.stride(0)
    numbers = batch, batch * heads, len(cosine), *rows
    if launch.project is not None and normalise is not None:
        query = states.new_empty((batch, 1, heads * head_dim))
        launch.project.start(scratch, (*tensors, query), numbers)
        tensors = *tensors, normalise(query).to(states.dtype).contiguous()
    launch.calls.start(scratch, tensors, numbers)
    return rotated, keys, values


def token_launch(
    states: Tensor,
    weights: Sequence[Tensor],
    tables: TokenTables,
    cosine: Tensor,
    shape: tuple[int, int, int],
    head_dim: int,
    biased: tuple[bool, bool, bool],
    *others: Any,
) -> TokenLaunch:
    """Of calls of this kind, whose last part says whether queries are not normalised."""
    batch, _, hidden_size = shape
    device, dtype = states.device, states.dtype
    query_size, key_size, value_size = sizes = tuple(len(weight) for weight in weights)
    heads = query_size // head_dim
    key_features, value_features = whole_words(key_size + 1), whole_words(value_size + 1)
    key_bytes, value_bytes = tables.keys.places.shape[1], tables.values.places.shape[1]
    together = others[-1]
    sizes_of = {
        **({"query": ((batch, query_size), dtype)} if together else {}),
        "key": ((batch, key_size), dtype),
        "value": ((batch, value_size), dtype),
        "key_features": ((batch, key_features), dtype),
        "value_features": ((batch, value_features), dtype),
    }
    parts, scratch = laid_out(sizes_of)

    def coding(of: str, codes: RowCodes, rotated: Tensor | None) -> tuple[Any, ...]:
        rows = 0 if rotated is None else batch * heads
        of_queries: tuple[Any, int, int] = (None, 0, 0)
        if rotated is not None:
            of_queries = (dtype, rotated.dtype), heads, head_dim
        features = whole_words(codes.numbers.shape[1] + 1)
        constants = row_constants(device, dtype, codes, features, *of_queries, FEW)
        coders, rotators = constants.named["ROWS"], constants.named["QUERIES"]
        grid = shares(batch, coders) + shares(rows, rotators), 1, 1
        named = {
            **NOTHING,
            **ALONE,
            **({} if rows else UNROTATED | NO_QUERIES),
            "x": of,
            "scaled": f"{of}_features",
            "packed": f"{of}_rows",
            "packed_first": f"{of}_first",
            "packed_stride": f"{of}_stride",
            "numbers_of": f"{of}_numbers",
            "places": f"{of}_places",
        }
        return encode_kernel, grid, constants, named

    def of_token(launch: Launch, **named: str) -> tuple[Any, ...]:
        return *launch, named

    project = projections_launch(device, dtype, batch, hidden_size, sizes, biased)
    kernels = [of_token(project, x="states"), coding("key", tables.keys, cosine)]
    if tables.prediction is not None:
        size = key_features, value_size
        predict = product_launch(device, dtype, batch, *size, biased=False, taken=True)
        named = {"weight": "prediction", "bias": "nothing", "output": "value"}
        kernels.append(of_token(predict, x="key_features", **named))
    kernels.append(coding("value", tables.values, None))
    fixed = dict(zip(TABLES, tensors_of(tables), strict=True)) | SAME
    of_calls = TENSORS if together else (*TENSORS, "query"), parts, fixed, NUMBERS
    alone = None if together else Calls(kernels[:1], *of_calls)
    calls = Calls(kernels if together else kernels[1:], *of_calls)
    rows = key_bytes, value_bytes
    return TokenLaunch(tensors_of(tables), alone, calls, scratch, rows)
