"""The attention of a source model: where a family keeps it, and what is read of its modules."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .tpa_rotary import PairOrder


@dataclass(frozen=True)
class AttentionNames:
    """Where a family keeps its attention, and how to read it; the defaults are those of most.

    Args:
        attention: the attention module of a decoder layer.
        query, key, value: its projections.
        fused: one projection that stacks queries, keys and values, instead of these.
        fused_by_head: whether it stacks them for each key head, after the queries that share it.
        output: the output projection.
        query_norm, key_norm: norms before rotation, of each head or of all heads together, for
            modules that have them.
        pairs: which two features of a head are rotated together.
        table: which two columns of the position embeddings belong to one pair.
        rotated_if: attribute of the attention module that is false or None where a layer rotates
            nothing; None if all layers rotate.
        layers, rotary: the layers of the decoder, and its rotary embedding.
    """

    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    fused: str | None = None
    fused_by_head: bool = False
    output: str = "o_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    pairs: PairOrder = "halves"
    table: PairOrder = "halves"
    rotated_if: str | None = None
    layers: str = "layers"
    rotary: str = "rotary_emb"

    def projection(self, attention: nn.Module, part: str) -> nn.Module:
        """The projection of the source's attention that makes its `query`, `key` or `value`."""
        return getattr(attention, self.fused or getattr(self, part))

    def table_order(self, attention: nn.Module) -> PairOrder | None:
        """`order` for `pair_table`, of an attention module of the source."""
        rotated = self.rotated_if is None or getattr(attention, self.rotated_if)
        return self.table if rotated else None


def sliding_window(source: Any, config: Any, layer_idx: int) -> int | None:
    """Tokens that a layer of the source attends to, None for all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer_idx] != "sliding_attention":
        return None
    return getattr(source if hasattr(source, "sliding_window") else config, "sliding_window", None)


def norm_width(norm: nn.Module) -> int:
    """How many features a norm of the source normalises together."""
    return next(norm.parameters()).numel()


def normalised_together(norm: nn.Module | None, head_dim: int, heads: int) -> bool | Literal["all"]:
    """What `LayerShape.key_norm` has to say of a norm of the source."""
    if norm is None:
        return False
    return "all" if norm_width(norm) == heads * head_dim != head_dim else True


def norm_epsilon(norm: Any) -> float:
    """What a norm of the source adds to the mean square; families call it one of two names."""
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
