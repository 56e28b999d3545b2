"""Gauges inside the projections around them: queries and outputs of components.

    q'_i = conj(T_j) q_i,    O'_i = O_i U_j        (head i uses the keys and values of head j)

for software that attends to components as they are cached and knows of no gauge.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_convert.modeling.tpa_keys import RotatedKeys


def component_queries(keys: RotatedKeys, rows: Tensor, num_heads: int) -> Tensor:
    """Rows of a query projection as those of queries that read components.

    Args:
        keys: static, with an applied or absorbed gauge.
        rows: [h d, columns], or [h width, columns] if they have absorbed the gauge already.

    Returns: [h, width, columns].
    """
    heads = rows.unflatten(0, (num_heads, -1)).mT[None]  # columns stand for tokens
    return keys.component_queries(heads)[0].mT


def component_output(gauge: Tensor | None, weight: Tensor, num_heads: int) -> Tensor:
    """An output projection that reads mixed components.

    Args:
        gauge: U, [j, d, width]; None if the projection has absorbed it already.
        weight: [D, h d], or [D, h width].

    Returns: [D, h, width].
    """
    columns = weight.unflatten(1, (num_heads, -1))
    if gauge is None:
        return columns
    of_head = gauge.repeat_interleave(num_heads // len(gauge), dim=0)
    return torch.einsum("xhd,hdw->xhw", columns, of_head)
