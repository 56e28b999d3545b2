"""The cache that attention is given: packed rows in those that transformers makes for heads, and
caches that rows are not for."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedLayer

from .tpa_paged import holds_rows

# transformers renamed it in 5.24; layers of GPT-NeoX have a name of their own
CACHE_NAMES = ("past_key_values", "cache", "layer_past")


def given_cache(arguments: dict[str, Any], pop: bool = False) -> Cache | None:
    """The cache among keyword arguments, whatever it is called there; `pop` takes it out."""
    cache = None
    for name in CACHE_NAMES:
        found = arguments.pop(name, None) if pop else arguments.get(name)
        cache = found if cache is None else cache
    return cache


def tokens_in(cache: Any, layer_idx: int) -> int | None:
    """Tokens that a layer of a cache is known to hold, without asking a GPU; None if it is not."""
    held = cache.get_seq_length(layer_idx) if isinstance(cache, Cache) else None
    return held if isinstance(held, int) else None


def refuse_quantised(cache: Cache, layer_idx: int) -> None:
    """Raises `ValueError` if a layer of the cache would quantise the codes it is given."""
    made = layer_idx < len(cache.layers)
    kind = type(cache.layers[layer_idx]) if made else cache.layer_class_to_replicate
    if isinstance(kind, type) and issubclass(kind, QuantizedLayer):
        raise ValueError(
            "the cache of this model is coded in bits already: use a dynamic or static cache, not "
            "a quantized one"
        )


class Room:
    """Rows of a layer of a dynamic cache, with room for more behind them: one token more needs no
    copy of those before.

    The layer holds views of the room that end with the last row. Whoever has seen them, a copy of
    the cache too, sees no row behind, so that no row is ever written twice.
    """

    least, share = 64, 32  # slots behind the others, or a share of those in use

    def __init__(self, like: torch.Tensor, rows: int, widths: tuple[int, int]):
        """For so many rows of as many sequences as `like` has, and more behind them, where it
        is."""
        self.slots, self.size = 0, rows + max(self.least, rows // self.share)
        sizes = [(len(like), 1, self.size, width) for width in widths]
        self.whole = [like.new_empty(size, dtype=torch.uint8) for size in sizes]
        # By the layer that it belongs to; missing while rows are on their way.
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """With rows that a layer holds."""
        self.slots = keys.shape[2]
        for whole, x in zip(self.whole, (keys, values), strict=True):
            whole[:, :, : self.slots] = x

    def claim(self, keys: torch.Tensor, values: torch.Tensor, rows: int) -> bool:
        """Whether new rows of the layer that holds these are to go behind them; then nobody else's
        are, in another thread neither, until they have been taken."""
        held = self.__dict__.pop("held", None)  # in one step
        if held is None:
            return False
        if held[0] is keys and held[1] is values and self.slots + rows <= self.size:
            return True
        self.held = held  # of another copy of the cache
        return False

    def __reduce__(self) -> Any:
        """A copy of the cache makes its own."""
        return type(None), ()

    def take(self, layer: DynamicLayer, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer holds with the rows that have been written behind the others."""
        self.slots += rows
        keys, values = self.whole
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        held = layer.keys, layer.values = keys[:, :, : self.slots], values[:, :, : self.slots]
        self.held = held
        return held


def room_in(
    cache: Any, layer_idx: int, like: torch.Tensor, rows: int, widths: tuple[int, int]
) -> Room | None:
    """Room for new rows in a layer of a plain dynamic cache, behind those that it holds; None in
    others.

    Args:
        like: has as many sequences, and is where rows go.
        rows: of each sequence.
        widths: bytes of a row of keys and of values.
    """
    if type(cache) is not DynamicCache or cache.offloading or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    if type(layer) is not DynamicLayer:
        return None
    if not layer.is_initialized:
        layer.room = Room(like, rows, widths)
        return layer.room
    keys, values = layer.keys, layer.values
    if keys is None or values is None or keys.dtype != torch.uint8 or not keys.numel():
        return None
    if (len(keys), keys.shape[3], values.shape[3]) != (len(like), *widths):
        return None  # the cache says what is wrong
    if keys.device != like.device:
        return None
    room: Room | None = layer.__dict__.get("room")
    if room is None or not room.claim(keys, values, rows):
        layer.room = None  # its memory may be what there is
        room = Room(like, keys.shape[2] + rows, widths)
        room.begin(keys, values)
        layer.room = room
    return room


def cache_grid(
    cache: Any, layer_idx: int, grid: tuple[int, int], widths: tuple[int, int]
) -> tuple[int, int] | None:
    """Heads and head dim of a cache that was made for those of the config, None for others.

    Paged caches, and static ones that somebody has initialised, hold [heads, head dim] numbers
    a token whatever comes; rows lie in there with zeros behind them.

    Args:
        grid: heads and head dim of the config.
        widths: of the packed keys and values.
    """
    if not isinstance(cache, Cache):
        packed = holds_rows(cache, layer_idx)
        return None if packed else grid
    if layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    for name in ("keys", "values"):  # in most caches the first one tells
        x = getattr(layer, name, None)
        if not isinstance(x, torch.Tensor) or x.ndim != 4 or (x.shape[1], x.shape[3]) != grid:
            return None
        if not x.numel():
            return None
    packed = [grid, grid] == [(1, width) for width in widths]
    return None if packed else grid


def fold(row: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Packed rows [b, 1, s, n] laid out as heads [b, heads, s, head dim], zeros behind them."""
    heads, head_dim = grid
    room = heads * head_dim - row.shape[-1]
    if room < 0:
        raise ValueError(
            f"{row.shape[-1]} numbers a token do not fit into a cache of {heads} heads of "
            f"{head_dim}: use a dynamic cache"
        )
    return nn.functional.pad(row[:, 0], (0, room)).unflatten(-1, grid).transpose(1, 2)


def unfold(heads: torch.Tensor, width: int) -> torch.Tensor:
    """Undoes `fold`: [b, heads, t, head dim] to [b, 1, t, width]."""
    return heads.transpose(1, 2).flatten(2)[..., :width].unsqueeze(1)
