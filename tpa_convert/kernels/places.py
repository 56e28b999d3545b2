"""Where the fields of coded rows stand when a kernel has taken its words apart.

Kernels read rows as 16-bit words and move each field of b bits to bit `place` of the mantissa of an
fp16 number v = 1 + code · 2^(place − 10) in [1, 2). Then a component is

    mean[class] + scale · gain · (v − centre)

with a gain and a centre for every *place*: tier by tier, chunk by chunk (a power of two of words),
field by field, word by word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .rows import CodedRows


# bits -> for each field of a word, lowest first: (left shift of the word, place in the mantissa).
# Fields share shifts, so that a code costs little more than half an instruction. Places are high,
# since what the constant 1 adds to a sum must not drown the codes.
FIELDS = {
    1: [
        *[(6, 6), (6, 7), (6, 8), (6, 9), (4, 8), (4, 9), (0, 6), (0, 7)],
        *[(0, 8), (0, 9), (-4, 6), (-4, 7), (-4, 8), (-4, 9), (-6, 8), (-6, 9)],
    ],
    2: [(4, 4), (4, 6), (0, 4), (0, 6), (0, 8), (-6, 4), (-6, 6), (-6, 8)],
    4: [(2, 2), (2, 6), (-6, 2), (-6, 6)],
    8: [(2, 2), (-6, 2)],
}
SMALLEST_CHUNK = 16  # words: the matrix unit adds 16 products at a time
WHOLE_TIER = 32  # words that are always one chunk
# bits -> words of the largest chunk: what measured fastest for keys, and for values what one
# program can sum up for all its queries.
KEY_CHUNKS = {1: 16, 2: 16, 4: 32, 8: 32}
VALUE_CHUNKS = {1: 16, 2: 64, 4: 128, 8: 128}


class Places(NamedTuple):
    """Tables that kernels use to read one part of a layer.

    Attributes:
        layout: offset of the header, classes, lowest octave, then for each tier its bits, its first
            word, its words and the words of a chunk.
        component_of: of each place, int32.
        gain, centre: of each place, fp32; a place that holds nothing has gain 0.
        mean: [classes, w], fp32.
        place_of: of each component, int32 [parts, w], −1 where it has fewer parts.
    """

    layout: list[int]
    component_of: Tensor
    gain: Tensor
    centre: Tensor
    mean: Tensor
    place_of: Tensor


def find_places(rows: CodedRows, chunks: dict[int, int]) -> Places:
    """Tables for `rows` with `chunks` of at most so many words, by bits."""
    layout = [rows.header, rows.classes, rows.lowest_octave]
    components, factors, centres = [], [], []
    place_of = torch.full((8, rows.width), -1, dtype=torch.int32)
    found = torch.zeros(rows.width, dtype=torch.int64)
    first_place = 0
    for tier in rows.tiers:
        words = tier.size // 2
        whole = max(SMALLEST_CHUNK, 1 << (words - 1).bit_length())
        chunk = whole if whole <= WHOLE_TIER else min(whole, chunks[tier.bits])
        layout += [tier.bits, tier.offset // 2, words, chunk]
        field = torch.arange(16 // tier.bits)[:, None]
        word = torch.arange(-(-words // chunk) * chunk).unflatten(0, (-1, 1, chunk))
        byte = 2 * word + field * tier.bits // 8  # [chunks, fields, words]
        code = (byte + field % (8 // tier.bits) * tier.size).flatten()
        real = ((word < words).expand(byte.shape).flatten()) & (code < tier.components)
        component = torch.where(real, tier.first + code, 0)
        place = torch.tensor([place for _, place in FIELDS[tier.bits]], dtype=torch.float64)
        place = place[:, None].expand(byte.shape).flatten()
        components.append(component)
        factors.append(torch.where(real, torch.exp2(10 + tier.shift - place), 0))
        centres.append(1 + (2**tier.bits - 1) / 2 * torch.exp2(place - 10))
        parts = component[real]
        place_of[found[parts], parts] = (first_place + real.nonzero()[:, 0]).int()
        found[parts] += 1
        first_place += len(code)
    device = rows.step.device
    component_of = torch.cat(components).to(device)
    return Places(
        layout,
        component_of.int(),
        (torch.cat(factors).to(device) * rows.step[component_of]).float(),
        torch.cat(centres).float().to(device),
        rows.mean.float().contiguous(),
        place_of[: int(found.max())].to(device),
    )
