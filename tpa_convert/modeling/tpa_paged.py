"""Packed rows in the paged cache of continuous batching (`generate_batch`, `transformers serve`).

transformers sizes that cache by the heads of a config. Its allocators are classes in a registry:
those here lay one token's rows of all layers behind each other instead, each as wide as the layer
makes it and in the type that it makes, floats or codes. What decides over blocks, sharing and
windows stays transformers' own.
"""

import weakref
from math import lcm
from typing import Any

import torch

Row = tuple[int, torch.dtype]
"""Numbers in a row, and their type."""

ROWS: dict[int, list[tuple[Row, Row]]] = {}
"""Rows of keys and of values of each layer, by the identity of a model's config."""


def pack_paged_cache(model: Any) -> None:
    """Has the paged caches of `model` hold packed rows. Nothing, where transformers has none."""
    try:
        register()
    except ImportError:
        return
    config = model.config
    if id(config) not in ROWS:
        weakref.finalize(config, ROWS.pop, id(config), None)
    ROWS[id(config)] = measured_rows(model)


@torch.no_grad()
def measured_rows(model: Any) -> list[tuple[Row, Row]]:
    """What each layer hands to a cache, seen on two tokens."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    output = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    # transformers renamed it in 5.24
    cache = next(output[name] for name in ("cache", "past_key_values") if name in output)
    return [
        ((layer.keys.shape[-1], layer.keys.dtype), (layer.values.shape[-1], layer.values.dtype))
        for layer in cache.layers
    ]


def holds_rows(cache: Any, layer_idx: int) -> bool:
    """Whether a paged cache holds the rows of this layer as they are."""
    allocator = getattr(cache, "layer_to_allocator", {}).get(layer_idx)
    return getattr(allocator, "packed", False)


def register() -> None:
    """Puts allocators that choose by the model into transformers' registry, once.

    Raises:
        ImportError: this version of transformers has no such registry.
    """
    from transformers.generation.continuous_batching import cache as paged

    for kind, stock in list(paged.ATTN_TYPE_TO_ALLOCATOR.items()):
        if not hasattr(stock, "chooses"):
            paged.ATTN_TYPE_TO_ALLOCATOR[kind] = choosing(stock)


def choosing(stock: Any) -> Any:
    """An allocator that is packed for models whose rows are known, and stock for all others."""
    allocator = packed(stock)

    class Choosing(stock):
        chooses = True

        def __new__(cls, **arguments: Any) -> Any:
            known = id(arguments["config"]) in ROWS
            return (allocator if known else stock)(**arguments)

    return Choosing


def packed(stock: Any) -> Any:
    """The stock allocator with other rows in its cache."""

    class Packed(stock):
        packed = True
        supports_block_table = False  # kernels that read blocks want heads of one size
        rows_per_token = 1  # all rows of a token lie behind each other

        def _before_cache_tensor_init(self, **arguments: Any) -> None:
            """The stock allocator sets its sizes here; one page then holds all layers."""
            layers, page = arguments["layer_indices"], arguments["tokens_per_page"]
            self.rows: dict[int, tuple[Row, Row]] = {i: self.known_rows[i] for i in layers}
            self.offsets, self.bytes_per_token = offsets(self.rows)
            arguments |= {
                "layer_indices": layers[:1],
                "bytes_per_page": self.bytes_per_token * page,
            }
            super()._before_cache_tensor_init(**arguments)
            self.layer_indices = layers

        def __init__(self, **arguments: Any):
            self.known_rows = ROWS[id(arguments["config"])]
            super().__init__(**arguments)

        def register_cache_tensor(
            self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: torch.Tensor, pool: Any
        ) -> None:
            """Views of the rows of each layer, [tokens, 1, numbers], in the bytes of all."""
            self.bytes_per_sector = bytes_per_sector
            self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
            tokens = cache_tensor.view(-1, self.bytes_per_token)
            self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, tokens, pool)

            def view(offset: int, row: Row) -> torch.Tensor:
                width, dtype = row
                part = tokens[:, offset : offset + width * dtype.itemsize]
                return part.view(dtype).unsqueeze(1)

            self._kv_token_views = {
                i: (view(self.offsets[i][0], key), view(self.offsets[i][1], value))
                for i, (key, value) in self.rows.items()
            }

    return Packed


def offsets(rows: dict[int, tuple[Row, Row]]) -> tuple[dict[int, tuple[int, int]], int]:
    """Where the rows of each layer begin among the bytes of a token, and how many there are.

    A row begins at a multiple of the size of its numbers.
    """
    begin, at, align = {}, 0, 1
    for i, pair in rows.items():
        starts = []
        for width, dtype in pair:
            size = dtype.itemsize
            align = lcm(align, size)
            start = -(-at // size) * size
            starts.append(start)
            at = start + width * size
        begin[i] = (starts[0], starts[1])
    return begin, -(-at // align) * align
