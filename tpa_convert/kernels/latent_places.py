"""Where the codes of coded latent keys and values are found in rows; see `latent_tables`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .rows import Tier, whole_words

NOTHING = -3  # a place of features that are zero
WORD = 4  # bytes of a row that are read at once; an item's places
BYTES = 0, 2, 1, 3  # of a word, in the order of its places: two codes lie in one half and the other
NIBBLE = 4  # bits of an item at most
FIRST_BIT = 3  # where the lowest bit of a code stands for one, and lies unless it is moved
LOWEST_BIT = 1  # where it may lie at least: centres are multiples of a half
MASK_BITS = 7


class Places(NamedTuple):
    """What stands in the places of some items, which are even in number, in pairs of one word.

    Attributes:
        items: [n].
        component: [n, 4], −1 for nothing.
        shift: of the code that lies in earlier tiers, [n, 4], less what its codes are moved up by.
    """

    items: Tensor
    component: Tensor
    shift: Tensor

    def at(self, lowest: Tensor) -> Places:
        """With the codes of each item from another bit of their bytes on than FIRST_BIT."""
        word, turn, codes = self.items & 0xFFFF, self.items >> 16, self.items >> 24 >> FIRST_BIT
        items = word | (turn + FIRST_BIT - lowest) % 32 << 16 | codes << lowest << 24
        return self._replace(items=items, shift=self.shift + FIRST_BIT - lowest[:, None])

    def in_pairs(self) -> Places:
        """By words, the 2j-th item and the next of the same one: that takes it apart for both. An
        item that holds nothing stands beside one that is left over."""
        word, count = (self.items & 0xFFFF).unique(return_counts=True)
        left = word[count % 2 == 1]
        nothing = torch.full((len(left), WORD), -1), torch.zeros(len(left), WORD, dtype=torch.long)
        made = Places(*(torch.cat(x) for x in zip(self, (left, *nothing), strict=True)))
        order = (made.items & 0xFFFF).argsort(stable=True)
        return Places(*(x[order] for x in made))

    def padded(self, multiple: int) -> Places:
        """With items behind, of the last word, that hold nothing; `multiple` at least."""
        count, word = len(self.items), (self.items & 0xFFFF)[-1:].sum()
        more = -count % multiple if count else multiple
        return Places(
            *(
                pad(x, (0, 0) * (x.ndim - 1) + (0, more), value=v)
                for x, v in zip(self, (int(word), -1, 0), strict=True)
            )
        )

    def reach(self, count: int) -> int:
        """Words from the first to the last of so many items, from a multiple of it on, at most."""
        words = [x & 0xFFFF for x in self.items.split(count)]
        return max((int(x.max() - x.min()) + 1 for x in words), default=0)


def places_of(tiers: Sequence[Tier], first: int, last: int) -> Places:
    """Items that hold the components from `first` on, before `last`."""
    found = []
    for tier in tiers:
        bits = min(tier.bits, NIBBLE)
        words = torch.arange(tier.offset // WORD, -(-(tier.offset + tier.size) // WORD))
        byte = WORD * words[:, None] + torch.tensor(BYTES) - tier.offset
        at = torch.arange(0, 8, bits)[:, None, None]  # where codes begin in a byte, or their halves
        code = at // tier.bits * tier.size + byte  # […, words, 4]
        component = tier.first + code
        used = (byte >= 0) & (byte < tier.size) & (code < tier.components)
        used &= (component >= first) & (component < last)
        index, word = used.any(-1).nonzero().T
        at = at[index, 0, 0]
        turn, keep = (at - FIRST_BIT) % 32, (2**bits - 1) << FIRST_BIT
        items = words[word] | turn << 16 | keep << 24
        component = torch.where(used, component, -1)[index, word]
        shift = tier.shift + at % tier.bits
        found.append(Places(items, component, shift[:, None].expand(-1, WORD)))
    return Places(*(torch.cat(x) for x in zip(*found, strict=True))).in_pairs()


def parts_of(places: Places, step: Tensor, first: int, of_class: int) -> tuple[Tensor, Tensor]:
    """`LatentTables.place_of` and `step` of one part's components and its second class, whose
    places begin with `first`."""
    component, shift = places.component.flatten(), places.shift.flatten()
    place = (component >= 0).nonzero()[:, 0]
    place = place[component[place].argsort(stable=True)]
    component, shift = component[place], shift[place]
    start = torch.searchsorted(component, component)
    part = torch.arange(len(place)) - start
    count = len(step)
    place_of = torch.full((int(part.max()) + 1, whole_words(count + 1)), -1)
    place_of[part, component] = first + place
    place_of[0, count] = of_class
    place_of[0, count + 1 :] = NOTHING
    steps = torch.zeros(place_of.shape)
    steps[part, component] = step.float().cpu()[component] * torch.exp2(shift.float())
    return place_of, steps
