"""Budgets of a cache that is coded in bits: bytes for everything, and what is decided before any
text is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpa_convert.coding import least_row_bytes
from tpa_convert.errors import UserError
from tpa_convert.modeling import LayerShape, codes_of
from tpa_convert.plans.plan import Budget, CodedBudget, Plan, floats_of_budget

# Rebuilding keys takes 2 n w / B operations a token, with n keys of w components in B blocks. With
# this many components a block a GPU still does it in less time than it reads the source's keys and
# values, 4 n bytes: 128 operations a byte, of some 300 that an H100 has.
WIDEST_BLOCK = 256
WIDE_ROW, ALIGN, ALIGN_WIDE = 256, 2, 16  # bytes; what kernels load at once pays in long rows only


def plan_coded(
    sizes: dict[str, Any],
    budget: Budget,
    *,
    bits: int | None = None,
    key_blocks: int | None = None,
) -> Plan:
    """A plan whose codes are still to be chosen, with layers of full width in their place.

    Args:
        sizes: `Family.attention_sizes` of the source.
        budget: floats, bytes or a ratio; a number has 16 bits.
        bits: mean over the components that are kept; where all have as many, what is left of the
            budget stays unused. None keeps as many components as is best.
        key_blocks: of rotary pairs; None for as few as decode quickly.

    Raises:
        UserError: a budget above the source's or without room for its rows, or blocks that cannot
            divide the rotary pairs.
    """
    layers, source_floats = sizes["num_hidden_layers"], _source_floats(sizes)
    floats = floats_of_budget(budget, layers, source_floats)
    if floats > source_floats:
        raise UserError(
            f"a budget of {floats:,.10g} numbers of 16 bits per token and layer is above the "
            f"source's {source_floats}: nothing to convert"
        )
    total = int(2 * floats * layers)
    align = ALIGN_WIDE if total / (2 * layers) >= WIDE_ROW else ALIGN
    least = 2 * layers * least_row_bytes(align)
    if total < least:
        raise UserError(
            f"a budget of {total} bytes per token is too small: {layers} layers need at least "
            f"{least} bytes"
        )
    pairs = sizes["head_dim"] // 2
    blocks = default_blocks(sizes) if key_blocks is None else key_blocks
    if pairs % blocks:
        raise UserError(
            f"`key_blocks` must divide the {pairs} rotary pairs of a head, not {blocks}"
        )
    if bits is not None:
        total = min(total, layers * _bytes_of_all(sizes, blocks, align, bits))
    groups = sizes["num_key_value_heads"]
    return Plan(
        [full_width_shape(sizes)] * layers,
        groups,
        sizes["head_dim"],
        coded=CodedBudget(total, blocks, align, bits),
    )


def default_blocks(sizes: dict[str, Any]) -> int:
    """The fewest blocks of rotary pairs, a power of two, in which rebuilding keys is quick."""
    width, pairs, blocks = _source_floats(sizes) // 2, sizes["head_dim"] // 2, 1
    while width > blocks * WIDEST_BLOCK and pairs % (2 * blocks) == 0:
        blocks *= 2
    return blocks


def full_width_shape(sizes: dict[str, Any]) -> LayerShape:
    """Of a layer whose components are as many as the source's keys and values."""
    width, rank = sizes["num_key_value_heads"] * sizes["head_dim"], sizes["num_key_value_heads"]
    return LayerShape(
        "static", "applied", "applied", rank, rank, width, width, "latent", sizes["key_norm"]
    )


def _bytes_of_all(sizes: dict[str, Any], blocks: int, align: int, bits: int) -> int:
    """Bytes of a layer's rows that give every component so many bits."""
    width = _source_floats(sizes) // 2
    shape = replace(
        full_width_shape(sizes),
        key_codes=codes_of([[(bits, width // blocks)]] * blocks),
        value_codes=codes_of([[(bits, width)]]),
        row_align=align,
    )
    return shape.cached_bytes(sizes["num_key_value_heads"])


def _source_floats(sizes: dict[str, Any]) -> int:
    return 2 * sizes["num_key_value_heads"] * sizes["head_dim"]
