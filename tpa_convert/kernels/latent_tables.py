"""What the kernels for latent keys look up: constants of one layer, made once of its parameters.

Components of keys belong to blocks of rotary pairs, and each block is rebuilt in chunks of
components, padded to whole ones. A *place* is one component in that order, those of the values
behind those of the keys. Keys of all heads come out in *spans*: whole heads whose pairs in one
block fit one program side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import Tier

CHUNK = 32  # places that a product adds up
PIECE = 64  # places that a program sums over slots
MAX_PAIRS = 64  # of a span; with more, H100 programs spill registers


class Rows(NamedTuple):
    """How one part (keys or values) of a layer is cached.

    Attributes:
        tiers: of coded rows; empty for numbers.
        header: offset of the header byte, which holds one of two classes and a scale.
        reach: half of the highest code of each component, [w].
        step: of each component, [w].
        lowest_octave: the scale of the lowest header, as a power of two.
    """

    tiers: Sequence[Tier]
    header: int
    reach: Tensor
    step: Tensor
    lowest_octave: int


def numbers(width: int, like: Tensor) -> Rows:
    """Of a part whose `width` components are cached as they are."""
    ones = torch.ones(width, dtype=torch.float32, device=like.device)
    return Rows((), 0, torch.zeros_like(ones), ones, 0)


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
        coded: 1 for rows of codes, 0 for numbers.
        groups: key/value heads.
        blocks: of rotary pairs.
        pairs: of a head in a block.
        heads: of a span.
        spans: of all heads.
        padded: pairs of a span, a power of two.
        parts: of a code, at most.
        header_k, header_v, octave_k, octave_v: see `Rows`.
        key_places: places of the keys, a multiple of PIECE.
        first_piece: the first of the pieces that are summed up: not those of the keys, if values
            do not follow from them.
        features: what comes out for each query.
        together: see `KeyMap`.
    """

    coded: int
    groups: int
    blocks: int
    pairs: int
    heads: int
    spans: int
    padded: int
    parts: int
    header_k: int
    header_v: int
    octave_k: int
    octave_v: int
    key_places: int
    first_piece: int
    features: int
    together: int


class LatentTables(NamedTuple):
    """Tables of one layer with P places, N = spans · padded pairs.

    Attributes:
        layout: a `Layout`.
        epsilon: of the norm.
        chunks: first chunk of each block of pairs, and the end of the last, int32 [B + 1].
        fields: of each part of the code in each place its byte, shift down, mask and shift up,
            int32 [parts, 4, P]; of numbers the component and a mask. Mask 0: nothing is there.
        centre: what is subtracted from codes, fp32 [P].
        weight: of key places, steps included, [key places, 2, N], real parts first.
        offset: what is added to keys, and more for the second class, fp32 [2, B, 2, N].
        norm: `unscale` and `gain`, fp32 [2, B, 2, N], or None.
        place_of: of each feature that comes out, int32; −1 and −2 for the share of the second
            class among values and among keys.
        step: of each feature, fp32.
    """

    layout: Layout
    epsilon: float
    chunks: Tensor
    fields: Tensor
    centre: Tensor
    weight: Tensor
    offset: Tensor
    norm: Tensor | None
    place_of: Tensor
    step: Tensor


def latent_tables(
    keys: Rows, values: Rows, key_map: KeyMap, dtype: torch.dtype, predicted: bool
) -> LatentTables:
    """Tables for a layer whose queries are in `dtype`.

    Args:
        predicted: whether values follow from key components too: the features that come out are
            then [values, their class, keys, their class], else the first two alone; of numbers
            there are no classes.
    """
    groups, size, width = key_map.weight.shape
    device, blocks, coded = key_map.weight.device, len(key_map.widths), bool(keys.tiers)
    pairs = size // 2
    # A norm over all heads is found where all of them are.
    most = (2 if key_map.together else 1) * MAX_PAIRS
    heads = max(1, min(groups, most // pairs))
    spans = -(-groups // heads)
    padded = max(16, 1 << (heads * pairs - 1).bit_length())
    chunks, component = [0], []
    first = 0
    for count in key_map.widths:
        component += [*range(first, first + count), *[-1] * (-count % CHUNK)]
        chunks.append(len(component) // CHUNK)
        first += count
    component += [-1] * (-len(component) % PIECE)
    key_places = len(component)
    of_values = len(values.step)
    component += [*range(width, width + of_values), *[-1] * (-of_values % PIECE)]
    of_place = torch.tensor(component, dtype=torch.int64)
    parts, fields = _fields(keys, values, width, of_place, coded)
    index, used = of_place.clamp_min(0).to(device), (of_place >= 0).to(device)
    centre = torch.where(used, torch.cat((keys.reach, values.reach)).float()[index], 0)

    # [g, 2, pairs, w] of heads in spans to [w, 2, N].
    scaled = key_map.weight.float() * keys.step.float()
    scaled = _in_spans(scaled.unflatten(1, (2, pairs)), heads, spans, padded)  # [2, N, w]
    of_keys = index[:key_places].clamp_max(width - 1)
    weight = torch.where(used[:key_places], scaled[..., of_keys], 0).permute(2, 0, 1)
    offsets = [key_map.offset, key_map.of_class]

    def by_block(x: Tensor | None) -> Tensor:
        """[g, d] to [B, 2, N]."""
        if x is None:
            x = torch.zeros_like(key_map.offset)
        x = x.float().expand(groups, -1).unflatten(-1, (2, blocks, pairs))
        return _in_spans(x.permute(0, 1, 3, 2), heads, spans, padded).permute(2, 0, 1)

    norm = None
    if key_map.unscale is not None:
        norm = torch.stack((by_block(key_map.unscale), by_block(key_map.gain))).contiguous()
    place_of = [key_places + i for i in range(of_values)]
    step = [values.step]
    inverse = [i for i, c in enumerate(component[:key_places]) if c >= 0]
    one = torch.ones(1, device=device)
    if coded:
        place_of, step = [*place_of, -1], [*step, one]
    if predicted:
        place_of, step = [*place_of, *inverse], [*step, keys.step]
        if coded:
            place_of, step = [*place_of, -2], [*step, one]
    layout = Layout(
        int(coded),
        groups,
        blocks,
        pairs,
        heads,
        spans,
        padded,
        parts,
        keys.header,
        values.header,
        keys.lowest_octave,
        values.lowest_octave,
        key_places,
        0 if predicted else key_places // PIECE,
        len(place_of),
        int(key_map.together),
    )
    return LatentTables(
        layout,
        key_map.epsilon,
        torch.tensor(chunks, dtype=torch.int32, device=device),
        fields.to(device),
        centre.contiguous(),
        weight.to(dtype).contiguous(),
        torch.stack([by_block(x) for x in offsets]).contiguous(),
        norm,
        torch.tensor(place_of, dtype=torch.int32, device=device),
        torch.cat([x.float() for x in step]).contiguous(),
    )


def _in_spans(x: Tensor, heads: int, spans: int, padded: int) -> Tensor:
    """[g, 2, pairs, n] to [2, spans · padded, n]: heads side by side, zeros behind each span."""
    made = x.new_zeros(2, spans, padded, x.shape[-1])
    for span in range(spans):
        here = x[span * heads : (span + 1) * heads].transpose(0, 1).flatten(1, 2)
        made[:, span, : here.shape[1]] = here
    return made.flatten(1, 2)


def _fields(
    keys: Rows, values: Rows, width: int, component: Tensor, coded: bool
) -> tuple[int, Tensor]:
    """`LatentTables.fields`, and how many parts there are, for the components in each place."""
    if not coded:
        byte = torch.where(component < width, component, component - width).clamp_min(0)
        used = (component >= 0).to(byte.dtype)
        return 1, torch.stack((byte, 0 * byte, used, 0 * byte))[None].int()
    total = width + len(values.step)
    table = torch.zeros(8, 4, total, dtype=torch.int64)
    found = torch.zeros(total, dtype=torch.int64)
    for rows, start in ((keys, 0), (values, width)):
        for bits, offset, size, first, count, shift in rows.tiers:
            code = torch.arange(count)
            at = start + first + code
            table[found[at], 0, at] = offset + code % size
            table[found[at], 1, at] = code // size * bits
            table[found[at], 2, at] = 2**bits - 1
            table[found[at], 3, at] = shift
            found[at] += 1
    parts = max(1, int(found.max()))
    table = torch.where(component >= 0, table[:parts][..., component.clamp_min(0)], 0)
    return parts, table.int()
