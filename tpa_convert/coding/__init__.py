"""A cache coded in bits: components, bits for them, codes and bytes. Pure functions on tensors."""

from tpa_convert.coding.allocation import LEVELS, allocate_bits, fit_row, row_layout, share_rows
from tpa_convert.coding.codes import (
    Quantiser,
    RowLayout,
    Tier,
    decode,
    encode,
    pack_rows,
    straight_through,
    unpack_rows,
)
from tpa_convert.coding.components import (
    Components,
    fisher_metric,
    importance_and_variance,
    key_metric,
    pair_blocks,
    prediction,
    principal_components,
    rotated_covariance,
    rotated_gauge,
    rotation_invariant,
    weighted_covariance,
)
from tpa_convert.coding.design import class_means, class_offset, design_quantiser, spreads

__all__ = [
    "LEVELS",
    "Components",
    "Quantiser",
    "RowLayout",
    "Tier",
    "allocate_bits",
    "class_means",
    "class_offset",
    "decode",
    "design_quantiser",
    "encode",
    "fisher_metric",
    "fit_row",
    "importance_and_variance",
    "key_metric",
    "pack_rows",
    "pair_blocks",
    "prediction",
    "principal_components",
    "rotated_covariance",
    "rotated_gauge",
    "rotation_invariant",
    "row_layout",
    "share_rows",
    "spreads",
    "straight_through",
    "unpack_rows",
    "weighted_covariance",
]
