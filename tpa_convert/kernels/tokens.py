"""One new token of each of a few sequences on its way into a cache of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .ops import launches
from .rows import FEATURES
from .token_tables import TokenTables

MOST_TOKENS = 64  # more of them keep a GPU busy for longer than the host


def takes_in(tokens: int, width: int) -> bool:
    """Whether kernels multiply so many rows of such a width by matrices: `take_in` by those of
    projections, and `attend_on_kernel` by that of the output, where they do the rest."""
    return tokens <= MOST_TOKENS and width % FEATURES == 0


def take_in(
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
    """Rotated queries [b, h, 1, d], and rows of bytes of keys and of values, [b, 1, 1, bytes], or
    the room that they are in; for those who know that kernels run it.

    Products add up in fp32, and are rounded once. No operator for compilers, which do without;
    without gradients.

    Args:
        states: of one token of each sequence, [b, 1, D].
        weights: of the projections to queries, and to components of keys and values, [n, D] each,
            in the type of the states.
        biases: theirs, [n] each, None for those without.
        cosine, sine: that queries are rotated by, see `rotation.rotate`.
        normalise: what comes before: queries [b, 1, h · d] in any shape of so many numbers.
        room: where rows are to go: of keys and of values, [b, 1, slots, bytes] each, contiguous
            within a sequence, and the slot.
    """
    given = states.contiguous(), weights, biases, tables, cosine, sine, head_dim, normalise, room
    return launches(".launch_token").launch_token(*given)
