"""Weights of coded latent keys as whole numbers of eight bits; see `latent_tables`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .latent_places import BYTES, FIRST_BIT, LOWEST_BIT, MASK_BITS, WORD

FINEST = 8  # weights of that part of the largest, and smaller ones, are of codes as low as can be
MOST_NOISE = 0.05  # of weights in eight bits, of that of codes; both are estimates
TINY = 1e-30


def of_places(x: Tensor, chunk: int) -> Tensor:
    """Numbers of items of whole chunks, for weights [chunks, spans, 2 N, chunk]."""
    return x.repeat_interleave(WORD).view(-1, 1, 1, chunk)


def lowest_bits(weight: Tensor, items: Tensor) -> Tensor:
    """Where in their bytes the codes of each item should begin.

    The larger weights are, the higher: they then are multiples of something smaller, and rounding
    them to that takes less off them.

    Args:
        weight: of codes, [chunks, spans, 2 N, chunk].
        items: with codes from FIRST_BIT on.
    """
    bits = torch.log2((items >> 24 >> FIRST_BIT) + 1.0)
    size = weight.abs()
    share = size / size.amax((0, 3), keepdim=True).clamp_min(TINY)
    share = share.unflatten(-1, (-1, WORD)).amax((1, 2, 4)).flatten()
    higher = torch.ceil(torch.log2(share * FINEST)).clamp_min(0)
    return LOWEST_BIT + higher.minimum(MASK_BITS - LOWEST_BIT - bits).int()


def in_eight_bits(
    weight: Tensor, items: Tensor, chunks: Sequence[int], blocks: int, of_components: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Items, and `LatentTables.whole` and `unit`; None where rounding to them would add to the
    error of codes.

    What rounding takes off the weights of some codes stands in items that held nothing: the same
    codes again, lower in their bytes, so that what they are multiples of is a part of that.

    Args:
        weight: [chunks, spans, 2 N, chunk].
        items: that they belong to.
        chunks: the block of pairs of each chunk, of so many `blocks`.
        of_components: weights of codes that are whole, [spans, 2 N, w].
    """
    block = torch.tensor(chunks, device=weight.device)
    size = weight.abs().amax(-1).unflatten(-1, (2, -1)).amax(-2)  # of a chunk, [chunks, spans, N]
    of_block = block[:, None, None].expand_as(size)
    largest = size.new_zeros(blocks, *size.shape[1:]).scatter_reduce(0, of_block, size, "amax")
    unit = largest.clamp_min(TINY) / 127
    # Pair by pair of items, [chunks · pairs, spans, 2 N, 2, 4].
    pairs = weight.shape[-1] // WORD // 2
    exact = weight.unflatten(-1, (pairs, 2, WORD)).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
    block, items = block.repeat_interleave(pairs), items.view(-1, 2)
    step = unit[block].repeat(1, 1, 2)[..., None, None]
    whole = (exact / step).round()
    left = exact / step - whole
    noise = _noise(left * step, items)
    for i in range(blocks):
        own = block == i
        free = (own & (items >> 24 == 0).all(1)).nonzero()[:, 0]
        worst = torch.where(own, noise, -1).argsort(descending=True, stable=True)
        count = min(len(free), int((own & (noise > 0)).sum()))
        to, of = free[:count], worst[:count]
        keep = items[of] >> 24
        lower = (torch.log2((keep & -keep).clamp_min(1)) - LOWEST_BIT).clamp_min(0).int()
        turn = ((items[of] >> 16) + lower) % 32
        items[to] = items[of] & 0xFFFF | turn << 16 | keep >> lower << 24
        rest = left[of] * torch.exp2(lower)[:, None, None, :, None]
        whole[to] = rest.round()
        noise[of] = _noise((rest - whole[to]) * step[of], items[to])
    items = items.flatten()
    if noise.sum() > MOST_NOISE * of_components.square().sum() / 12:
        return items, None, None
    whole = whole[..., [BYTES.index(i) for i in range(WORD)]]  # in the order of memory
    whole = whole.unflatten(0, (-1, pairs)).permute(0, 2, 3, 1, 4, 5).flatten(3)
    return items, whole.to(torch.int8).contiguous(), unit / 16


def _noise(error: Tensor, items: Tensor) -> Tensor:
    """What errors of weights [pairs, spans, 2 N, 2, 4] give keys, squared and on average, where
    codes are as often one as another: more than they do."""
    keep = items >> 24  # [pairs, 2]
    squares = (keep.square() + 2 * keep * (keep & -keep)) / (3 * 16**2)
    return (error.square().sum((1, 2, 4)) * squares).sum(-1)
