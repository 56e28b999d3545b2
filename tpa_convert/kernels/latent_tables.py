"""What the kernels for coded latent keys look up: constants of one layer, made once of its
parameters.

Rows are read by words of four bytes. An *item* is a word, a shift and a mask of at most four bits:
what is found by them in each of its bytes stands in one of its four *places*, in the order
`latent_places.BYTES`. Two items each are of one word. Codes of more bits or of several tiers stand
in several places, each taken times what its bits are worth: codes add up of them, and components of
codes. Items of keys come block by block of rotary pairs, each padded to whole chunks (one at least,
for keys may be no more than their offsets), then those of values. Keys of all heads come out in
*spans*: whole heads whose pairs in one block fit one program side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .latent_places import FIRST_BIT, WORD, Places, parts_of, places_of
from .latent_whole import in_eight_bits, lowest_bits, of_places
from .rows import Tier

CHUNK = 64  # places of keys that a product adds up
PIECE = 128  # places that a program of `latent_sums.py` sums over slots
PLACES = 256  # that one of `latent_sums_hopper.py` does
MAX_PAIRS = 64  # of a span
MAX_NORMED = 128  # the same, where a norm is that of all heads


class Rows(NamedTuple):
    """How one part (keys or values) of a layer is cached.

    Attributes:
        tiers: of the rows.
        header: offset of the header byte, which holds one of two classes and a scale.
        step: of each component, [w].
        lowest_octave: the scale of the lowest header, as a power of two.
    """

    tiers: Sequence[Tier]
    header: int
    step: Tensor
    lowest_octave: int


class KeyMap(NamedTuple):
    """How keys come out of components, for g heads of d dims in B blocks of rotary pairs.

    Attributes:
        weight: [g, d / B, w], components block by block; of the rows the real parts come first.
        widths: components of each block.
        offset: [g, d], real parts of all pairs first.
        of_class: what the second class adds to the offset, [g, d], or None.
        unscale: what keys are taken times before their root mean square is found, [d] or [g, d];
            None for keys without a norm.
        gain: what normalised keys are taken times, of the same shape.
        epsilon: added to the mean square.
        together: whether the mean is that over all heads.
    """

    weight: Tensor
    widths: Sequence[int]
    offset: Tensor
    of_class: Tensor | None = None
    unscale: Tensor | None = None
    gain: Tensor | None = None
    epsilon: float = 0.0
    together: bool = False


class Layout(NamedTuple):
    """Numbers that the tables were made for.

    Attributes:
        groups: key/value heads.
        blocks: of rotary pairs.
        pairs: of a head in a block.
        padded: the same, a power of two.
        heads: of a span, a power of two.
        spans: of all heads.
        header_k, header_v, octave_k, octave_v: see `Rows`.
        key_items: of the keys.
        first_item: that is summed up: not those of the keys, if values do not follow from them.
        together: see `KeyMap`.
        reach: words from the first to the last of any `PLACES` places, from a multiple of it on.
        items, chunks, parts, features: how many; see `LatentTables`.
    """

    groups: int
    blocks: int
    pairs: int
    padded: int
    heads: int
    spans: int
    header_k: int
    header_v: int
    octave_k: int
    octave_v: int
    key_items: int
    first_item: int
    together: int
    reach: int
    items: int
    chunks: int
    parts: int
    features: int

    def queries_of_span(self, heads: int, positions: int) -> int:
        """Of `heads` query heads at so many positions, those whose keys are in one span."""
        return self.heads * (heads // self.groups) * positions


class LatentTables(NamedTuple):
    """Tables of one layer with I items, N = heads · padded pairs of a span.

    Attributes:
        layout: a `Layout`.
        epsilon: of the norm.
        chunks: the block of pairs that each chunk belongs to, and B behind the last, int32.
        behind: the chunk behind the last of each block of pairs, int32 [B].
        items: of each item the word in the row (bits 0 to 15), by how many bits it is turned to
            the right (16 to 23), and the mask that is left (24 to 30), int32 [I]; 0 for nothing.
            What is left of a byte stands for an eighth of it, less that of the mask's half.
        weight: of key places, steps included, [chunks, spans, 2 N, CHUNK], real parts first.
        whole: `weight` in whole numbers, int8, for places in the order of bytes: what is left of a
            byte stands for twice itself, less the mask. None where eight bits are too few.
        unit: what the sums of their products stand for, fp32 [B, spans, N]; None without them.
        offset: what is added to keys, and more for the second class, fp32 [2, B, spans, 2 N].
        norm: `unscale` and `gain`, fp32 [2, B, spans, 2 N], or None.
        place_of: places that each feature is summed up of, int32 [parts, features]; −1 for none. Of
            the features of the second class the first is −1 for that of values, −2 for keys. Zeros
            behind those of values and of keys, up to whole words, have
            `latent_places.NOTHING`.
        step: what each of them is taken times, fp32 [parts, features].
        launches: what `launch_latent` has worked out for these tables.
    """

    layout: Layout
    epsilon: float
    chunks: Tensor
    behind: Tensor
    items: Tensor
    weight: Tensor
    whole: Tensor | None
    unit: Tensor | None
    offset: Tensor
    norm: Tensor | None
    place_of: Tensor
    step: Tensor
    launches: dict[Any, Any]


class OutputMap(NamedTuple):
    """What follows attention: matrices that make heads of features, and the output projection.

    Attributes:
        gauge, offset: of the j groups of heads, [j, d, features] and [j, d] or None.
        projection, bias: [D, h · d] and [D] or None.
    """

    gauge: Tensor
    offset: Tensor | None
    projection: Tensor
    bias: Tensor | None

    def kind(self) -> tuple[int, bool, bool]:
        """What kernels are launched by: size of what comes out, and what is added."""
        return len(self.projection), self.offset is not None, self.bias is not None


def latent_tables(
    keys: Rows, values: Rows, key_map: KeyMap, dtype: torch.dtype, predicted: bool
) -> LatentTables:
    """Tables for a layer whose queries are in `dtype`.

    Args:
        predicted: whether values follow from key components too: the features that come out are
            then [values, their class, zeros, keys, their class, zeros], else the first half.
    """
    groups, size, _ = key_map.weight.shape
    device, blocks = key_map.weight.device, len(key_map.widths)
    pairs = size // 2
    padded = 1 << (pairs - 1).bit_length()
    # A norm over all heads is found where all of them are.
    most = MAX_NORMED if key_map.together else MAX_PAIRS
    heads = 1 << (max(1, min(groups, most // padded)) - 1).bit_length()
    padded = max(padded, 16 // heads)
    spans = -(-groups // heads)
    chunks, behind, of_blocks = [], [], []
    first = 0
    for i, count in enumerate(key_map.widths):
        of_blocks.append(places_of(keys.tiers, first, first + count).padded(CHUNK // WORD))
        chunks += [i] * (len(of_blocks[-1].items) // (CHUNK // WORD))
        behind.append(len(chunks))
        first += count
    of_keys = Places(*(torch.cat(x) for x in zip(*of_blocks, strict=True)))
    of_values = places_of(values.tiers, 0, len(values.step)).padded(PIECE // WORD)

    # [g, 2, pairs, w] of heads in spans to [chunks, spans, 2 N, CHUNK].
    component, shift = of_keys.component.flatten().to(device), of_keys.shift.flatten().to(device)
    scaled = key_map.weight.float() * keys.step.float()
    scaled = _in_spans(scaled.unflatten(1, (2, pairs)), heads, spans, padded)  # [spans, 2 N, w]
    weight = scaled[..., component.clamp_min(0)] * torch.exp2(shift.float())
    weight = torch.where(component >= 0, weight, 0).unflatten(-1, (-1, CHUNK)).permute(2, 0, 1, 3)
    lowest = lowest_bits(weight, of_keys.items.to(device))
    of_keys, weight = (
        of_keys.at(lowest.cpu()),
        weight * of_places(torch.exp2(FIRST_BIT - lowest), CHUNK),
    )
    items, whole, unit = in_eight_bits(weight, of_keys.items.to(device), chunks, blocks, scaled)
    of_keys = of_keys._replace(items=items.cpu())
    offsets = [key_map.offset, key_map.of_class]

    def by_block(x: Tensor | None) -> Tensor:
        """[g, d] to [B, spans, 2 N]."""
        if x is None:
            x = torch.zeros_like(key_map.offset)
        x = x.float().expand(groups, -1).unflatten(-1, (2, blocks, pairs))
        return _in_spans(x.permute(0, 1, 3, 2), heads, spans, padded).permute(2, 0, 1)

    norm = None
    if key_map.unscale is not None:
        norm = torch.stack((by_block(key_map.unscale), by_block(key_map.gain))).contiguous()
    of_keys = of_keys.padded(PIECE // WORD)
    key_items = len(of_keys.items)
    features = [parts_of(of_values, values.step, WORD * key_items, -1)]
    if predicted:
        features.append(parts_of(of_keys, keys.step, 0, -2))
    parts = max(len(place) for place, _ in features)
    place_of, step = (
        torch.cat([pad(x, (0, 0, 0, parts - len(x)), value=v) for x in tables], 1)
        for tables, v in zip(zip(*features, strict=True), (-1, 0.0), strict=True)
    )
    layout = Layout(
        groups,
        blocks,
        pairs,
        padded,
        heads,
        spans,
        keys.header,
        values.header,
        keys.lowest_octave,
        values.lowest_octave,
        key_items,
        0 if predicted else key_items,
        int(key_map.together),
        max(x.reach(PLACES // WORD) for x in (of_keys, of_values)),
        key_items + len(of_values.items),
        len(chunks),
        *place_of.shape,
    )
    return LatentTables(
        layout,
        key_map.epsilon,
        torch.tensor([*chunks, blocks], dtype=torch.int32, device=device),
        torch.tensor(behind, dtype=torch.int32, device=device),
        torch.cat((of_keys.items, of_values.items)).int().to(device),
        weight.to(dtype).contiguous(),
        whole,
        unit,
        torch.stack([by_block(x) for x in offsets]).contiguous(),
        norm,
        place_of.int().to(device),
        step.float().contiguous().to(device),
        {},
    )


def _in_spans(x: Tensor, heads: int, spans: int, padded: int) -> Tensor:
    """[g, 2, pairs, n] to [spans, 2 · heads · padded, n], padded by zeros: real parts first, of
    eight pairs of the first head, the same of the others, and so on."""
    groups, _, pairs, _ = x.shape
    low = min(8, padded)  # rows that one thread of Hopper's matrix unit holds are 8 apart
    made = pad(x, (0, 0, 0, padded - pairs, 0, 0, 0, heads * spans - groups))
    made = made.unflatten(0, (spans, heads)).unflatten(3, (-1, low))
    return made.permute(0, 2, 3, 1, 4, 5).flatten(1, 4)
