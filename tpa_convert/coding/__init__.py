"""A cache coded in bits: components and bits for them. Pure functions on tensors.

What turns components into codes, rows of bytes and back travels with the models:
`modeling.tpa_codes`.
"""

from tpa_convert.coding.allocation import (
    LEVELS,
    RowTable,
    allocate_bits,
    fit_tiers,
    groups_of_bits,
    least_row_bytes,
    mean_bits,
    remaining_error,
    share_bytes,
    share_rows,
)
from tpa_convert.coding.components import (
    Components,
    component_energies,
    fisher_metric,
    pair_blocks,
    principal_components,
)
from tpa_convert.coding.design import (
    Part,
    Prediction,
    coded_order,
    design_quantiser,
    part_of,
    predict_values,
)
from tpa_convert.coding.moments import CacheMoments

__all__ = [
    "LEVELS",
    "CacheMoments",
    "Components",
    "Part",
    "Prediction",
    "RowTable",
    "allocate_bits",
    "coded_order",
    "component_energies",
    "design_quantiser",
    "fisher_metric",
    "fit_tiers",
    "groups_of_bits",
    "least_row_bytes",
    "mean_bits",
    "pair_blocks",
    "part_of",
    "predict_values",
    "principal_components",
    "remaining_error",
    "share_bytes",
    "share_rows",
]
