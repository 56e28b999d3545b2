"""Rotary position embedding (RoPE) on pairs of features, and the positions of what is cached.

Features are half-split: of 2 P features, p and p + P are the pair p. Letters: b batch, s new
tokens, t cached tokens, f rotary pairs.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers.cache_utils import Cache

from .tpa_kernels import wants_gradients

Table = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, [b, 1, s, f] each (the 1 stands for all heads); or [b, 1, s, 2 f] for the
features of the pairs, where the sines of the first half are negative."""

PairOrder = Literal["halves", "neighbours"]
"""Which two of 2 f features are the pair p: p and p + f, or 2 p and 2 p + 1."""


def rotate(
    x: torch.Tensor, table: Table, rotation: Callable[..., torch.Tensor | None] | None = None
) -> torch.Tensor:
    """Rotates the pairs of half-split features `x` [b, j, s, 2 P] by `table` [b, 1, s, 2 P].

    The result has the type of `x`: some families (Olmo 2, Ernie 4.5) keep tables in fp32.

    Args:
        rotation: does it in one launch where it can; compilers fuse the operators themselves.
    """
    cos, sin = table
    if rotation is not None and not torch.compiler.is_compiling() and not wants_gradients(x):
        rotated = rotation(x, cos, sin)
        if rotated is not None:
            return rotated
    real, imaginary = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((imaginary, real), -1), sin).to(x.dtype)


def feature_table(table: Table) -> Table:
    """The table of features [b, 1, s, 2 f] in that of pairs [b, 1, s, f]."""
    cos, sin = table
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def pairs_of(table: Table) -> Table:
    """The table of pairs [b, s, f], of all heads, in that of features [b, 1, s, 2 f]."""
    pairs = table[0].shape[-1] // 2
    cos, sin = (x[:, 0, :, pairs:] for x in table)
    return cos, sin


def pair_table(position_embeddings: Table, pairs: int, order: PairOrder | None = "halves") -> Table:
    """The table [b, 1, s, pairs] in transformers' position embeddings [b, s, 2 f], f <= pairs.

    Pairs beyond the f that the source rotates (partial rotary embedding) stay where they are.

    Args:
        order: which two columns belong to a pair; None for a layer that rotates nothing.
    """
    columns = {
        "halves": lambda part: part[..., : part.shape[-1] // 2],
        "neighbours": lambda part: part[..., ::2],
        None: lambda part: part[..., :0],
    }[order]
    cos, sin = (columns(part).unsqueeze(1) for part in position_embeddings)
    rest = pairs - cos.shape[-1]
    if rest:
        cos = nn.functional.pad(cos, (0, rest), value=1.0)
        sin = nn.functional.pad(sin, (0, rest), value=0.0)
    return cos, sin


def slot_positions(
    cache: Cache,
    layer_idx: int,
    length: int,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Positions [b or 1, t] of all slots that a layer attends to once `length` tokens are added.

    New slots are where `position_ids` says. Of older ones, those attended to follow each other up
    to the new ones, as generation counts them: padding, on the left or between, takes no position.
    Free slots of a static cache count as the last, since RoPE scaling may depend on the largest
    position; nothing attends to them.

    Args:
        cache: before the update.
        position_ids: of the new tokens, [b or 1, s], or None if they follow the cache's slots.
        attention_mask: of the slots [b, t] or less, or as attention takes it, [b, 1, s, t].
    """
    first = cache.get_seq_length(layer_idx)
    slots_t, offset = cache.get_mask_sizes(length, layer_idx)
    last = first + length - 1
    if position_ids is not None and attention_mask is None and length == 1:
        # As below, in fewer steps: every token asks.
        if isinstance(last, int) and last == offset + slots_t - 1:  # no free slots
            return position_ids + torch.arange(offset - last, 1, device=device)
        slots = offset + torch.arange(slots_t, device=device)
        return position_ids + (slots - last).clamp(max=0)
    slots = offset + torch.arange(slots_t, device=device)[None]
    if position_ids is None:
        return slots.clamp(max=last)
    attended = slots <= last
    if isinstance(attention_mask, torch.Tensor):
        mask = attention_mask
        mask = mask == 0 if mask.is_floating_point() else mask.bool()
        # A slot outside the window of the last token may be inside that of an earlier one.
        mask = mask[:, 0].any(1) if mask.ndim == 4 else mask
        mask = mask[:, -slots_t:]
        attended = nn.functional.pad(mask, (0, slots_t - mask.shape[1]))
    batch = max(len(position_ids), len(attended))
    count = attended.cumsum(-1).expand(batch, -1)
    given = position_ids[:, (slots[0] - first).clamp(0, length - 1)].expand(batch, -1)
    new = (slots >= first) & (slots <= last)
    # Any new slot that is attended to tells what to add to a row's counts.
    index = torch.arange(slots_t, device=device)
    known = torch.where(new & attended, index, -1).amax(-1, keepdim=True)
    known = torch.where(known < 0, (last - offset), known).expand(batch, -1)
    return torch.where(new, given, count + given.gather(1, known) - count.gather(1, known))


def paged_positions(
    starts_q: torch.Tensor, starts_k: torch.Tensor, position_ids: torch.Tensor, slots: int
) -> torch.Tensor:
    """Positions [1, slots] of the tokens that a paged cache returns for several requests in a row.

    Args:
        starts_q, starts_k: where each request begins among the new and among all its tokens, and
            the end of the last, [requests + 1].
        position_ids: of the new tokens, [1, s].
        slots: tokens returned; what lies beyond the last request is padding.
    """
    index = torch.arange(slots, device=position_ids.device)
    request = torch.searchsorted(starts_k[1:].contiguous().long(), index, right=True)
    request = request.clamp(max=len(starts_k) - 2)
    last = position_ids[0, (starts_q[1:].long() - 1).clamp(0, position_ids.shape[1] - 1)]
    return (last[request] - (starts_k[1:].long()[request] - 1 - index))[None].clamp(min=0)


class LayerRotary:
    """The rotary embedding of one layer: (any tensor of the right type, positions [b, t]) ->
    cosines and sines [b, t, rotated dims]."""

    def __init__(
        self, module: nn.Module, arguments: dict[str, Any], kept: dict[Any, Any], last: bool
    ):
        self.module, self.arguments, self.kind = module, arguments, tuple(arguments.values())
        self.kept, self.last = kept, last

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> Table:
        return self.module(x, positions, **self.arguments)

    def shared(self, given: tuple[Any, ...], key: tuple[Any, ...], make: Callable) -> Any:
        """What `make` returns, once for all layers of a forward pass that are given the same.

        Args:
            given: the very objects that it follows from, one of them new in each pass.
            key: what else has to be equal.
        """
        if torch.compiler.is_compiling():  # which finds what is equal by itself
            return make()
        key = self.kind, key
        found = self.kept.get(key)
        if found is not None:
            for a, b in zip(found[0], given, strict=True):  # every layer asks
                if a is not b:
                    break
            else:
                return found[1]
        made = make()
        self.kept[key] = given, made  # not read again: another thread may put its own there
        return made

    def done(self) -> None:
        """To be called when the layer is: what is shared goes with the last one."""
        if not torch.compiler.is_compiling() and self.last:
            self.kept.clear()
