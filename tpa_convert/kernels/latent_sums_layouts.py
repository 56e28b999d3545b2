"""How threads share the tiles of `latent_sums_hopper.py`: what each loads is what it multiplies."""

# mypy: disable-error-code="misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def highest_bits(*axes):
    """Bases of a layout: of each (axis, rank, first, stop) those powers of two."""
    found = []
    for axis, rank, first, stop in axes:
        while first < stop:
            found.append([first if i == axis else 0 for i in range(rank)])
            first *= 2
    return found


@gluon.constexpr_function
def words_layout(warps, pairs):
    """Of words [warps, slots, pairs of items]: eight slots side by side are one thread's."""
    return gl.DistributedLinearLayout(
        reg_bases=highest_bits((1, 3, 1, 8), (2, 3, 8, pairs)),
        lane_bases=highest_bits((1, 3, 8, 32), (2, 3, 1, 8)),
        warp_bases=highest_bits((0, 3, 1, warps)),
        block_bases=[],
        shape=[warps, 32, pairs],
    )


@gluon.constexpr_function
def fours_layout(columns, fours):
    """Of four words each of weights [columns, fours]: a thread has those of one column."""
    return gl.DistributedLinearLayout(
        reg_bases=highest_bits((1, 2, 4, fours)),
        lane_bases=highest_bits((1, 2, 1, 4), (0, 2, 1, 8)),
        warp_bases=highest_bits((0, 2, 8, columns)) + [[0, 0]] * (32 // columns - 1),
        block_bases=[],
        shape=[columns, fours],
    )


@gluon.constexpr_function
def all_items_layout(warps, items):
    """Of a program's items, all of which every warp has."""
    return gl.DistributedLinearLayout(
        reg_bases=highest_bits((0, 1, 32, items)),
        lane_bases=highest_bits((0, 1, 1, 32)),
        warp_bases=[[0]] * (warps.bit_length() - 1),
        block_bases=[],
        shape=[items],
    )


@gluon.constexpr_function
def sums_layout(warps, columns, places):
    """Of sums [places, columns]: eight places side by side are one thread's, as it multiplies
    them."""
    return gl.DistributedLinearLayout(
        reg_bases=highest_bits(
            (0, 2, 1, 8), (1, 2, 1, 2), (1, 2, 8, columns), (0, 2, 64, places // warps)
        ),
        lane_bases=highest_bits((1, 2, 2, 8), (0, 2, 8, 64)),
        warp_bases=highest_bits((0, 2, places // warps, places)),
        block_bases=[],
        shape=[places, columns],
    )


@gluon.constexpr_function
def terms_layout(warps, columns, blocks):
    """Of terms [blocks, columns]: every warp has all."""
    return gl.DistributedLinearLayout(
        reg_bases=highest_bits((0, 2, 4, blocks), (1, 2, 8, columns)),
        lane_bases=highest_bits((0, 2, 1, 4), (1, 2, 1, 8)),
        warp_bases=[[0, 0]] * (warps.bit_length() - 1),
        block_bases=[],
        shape=[blocks, columns],
    )
