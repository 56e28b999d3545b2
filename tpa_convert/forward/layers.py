"""One decoder layer of a source, run by itself on whole, unpadded sequences."""

from __future__ import annotations

from torch import Tensor, nn


def run_layer(
    layer: nn.Module, hidden: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """Hidden states [b, t, D] after a decoder layer of transformers, which may return a tuple.

    Args:
        positions: of the tokens, [1, t].
        rotary: position embeddings of the source's rotary module at these positions.
    """
    output = layer(hidden, position_ids=positions, position_embeddings=rotary)
    return output[0] if isinstance(output, tuple) else output
