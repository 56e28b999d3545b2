"""Layouts of the keys of Tensor Product Attention: what is cached, and how keys come out of it.

    k_j(x) = s Σ_r a_{r,j}(x) T_{r,j} b_r(x)        (arXiv 2501.06425, eq. 3.1, with a gauge T)

A layout packs a token's numbers as one head, [b, 1, s, width]; caches of transformers hold that
like any key. Parameters are read in the forward pass of the module that owns them, so that hooks
which bring them to a device (offloading) see every use.

Shape suffixes and einsum letters:
    b  batch                       j  key/value heads       r  rank (component)
    s  new tokens, t  cached ones  n  query heads per key/value head
    d  head_dim, d = 2 f           p  rotary pairs of one component
    P  rotary pairs of all components, width = 2 P           c  real or imaginary part (2)
"""

from typing import Any

import torch
from torch import nn

from .tpa_coder import RowCoder
from .tpa_codes import CLASSES
from .tpa_configuration import LayerShape
from .tpa_gauges import BlockGauge, HeadGauge, Heads, PairGauge, each_head, heads_of, of_heads
from .tpa_kernels import find_rotation
from .tpa_rotary import Table, rotate


class KeyNorm(nn.Module):
    """Scale that brings keys to the norm that the source's QK-norm gives them.

    The source's keys are γ ⊙ k / rms(k). The layouts rebuild z = γ' ⊙ k, since γ commutes with no
    rotation and has to be inside the factors; this is 1 / rms(z / γ'). γ' is γ, but nowhere zero: a
    key that γ hides counts in the norm. A norm over all heads together has one γ for each.
    """

    least = 3e-5  # of the largest weight, in γ'

    def __init__(self, head_dim: int, eps: float, heads: int | None = None):
        super().__init__()
        self.all_heads = heads is not None
        self.weight = nn.Parameter(torch.ones(*(() if heads is None else (heads,)), head_dim))
        self.eps = eps

    def weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """γ and γ', [d] each, or [j, d] of all heads together."""
        weight = self.weight.to(dtype)
        size = weight.abs()
        least = self.least * size.max()
        return weight, torch.where(size < least, least, weight)

    def forward(self, keys: torch.Tensor, hide: bool = False) -> torch.Tensor:
        """Scales [b, j or 1, s, 1] of keys before rotation, z [b, j, s, d]; computed in fp32 at
        least.

        With `hide`, scales [b, j, s, d] that also turn γ' into γ.
        """
        exact = torch.promote_types(keys.dtype, torch.float32)
        weight, divisor = self.weights(exact)
        if self.all_heads:
            weight, divisor = weight[:, None], divisor[:, None]
        unscaled = keys.to(exact) / divisor
        together = (1, -1) if self.all_heads else -1
        scale = (unscaled.square().mean(together, keepdim=True) + self.eps).rsqrt()
        return (scale * (weight / divisor) if hide else scale).to(keys.dtype)


class KeyLayout(nn.Module):
    """What all layouts of keys have: a projection to what is cached, and perhaps a norm."""

    gauge: Any

    def __init__(
        self,
        shape: LayerShape,
        hidden_size: int,
        heads: int,
        head_dim: int,
        bias: bool,
        norm_eps: float | None,
    ):
        super().__init__()
        self.shape, self.heads, self.head_dim = shape, heads, head_dim
        self.coder: RowCoder | None = None
        self.rotation = find_rotation()
        self.feature_factor = nn.Linear(hidden_size, shape.width_k, bias=bias)
        self.norm = None
        if norm_eps is not None:
            self.norm = KeyNorm(head_dim, norm_eps, heads if shape.key_norm == "all" else None)


class RotatedKeys(KeyLayout):
    """Components on single rotary pairs, cached after rotation, with constant head factors.

    Queries meet the cache as it is: q' = conj(T) q, folded into the query projection (`absorbed`)
    or applied to each query. Keys that are normalised cache one scale for each head in front.
    """

    rotary_pair: torch.Tensor

    def __init__(self, shape: LayerShape, hidden_size: int, heads: int, *rest: Any, **named: Any):
        super().__init__(shape, hidden_size, heads, *rest, **named)
        self.absorbed = shape.key_gauge == "absorbed"
        self.rank = shape.rank_k if shape.contextual else 1
        self.expanded_heads = 1 if self.absorbed and not shape.contextual else heads
        self.gauge = PairGauge(heads, shape.width_k // 2) if shape.key_gauge == "applied" else None
        # Follows from the config: what loading leaves out, `init_weights` makes again.
        self.register_buffer("rotary_pair", self._rotary_pair(), persistent=False)

    def _rotary_pair(self) -> torch.Tensor:
        return torch.tensor(self.shape.rotary_pairs(self.head_dim), device="cpu")

    def reset_rotary_pair(self) -> None:
        """Fills the index of rotary pairs again, from the config."""
        self.rotary_pair.copy_(self._rotary_pair())

    def tables(self, table: Table) -> tuple[Table, Table]:
        """The tables that queries, and what `pack` caches, are rotated by, of that of the head's
        features: cosines and sines on the features of the components, [b, 1, s, width].

        Queries have components too if the gauge is absorbed.
        """
        feature = torch.cat((self.rotary_pair, self.rotary_pair + self.head_dim // 2))
        cos, sin = (x[..., feature] for x in table)
        return (cos, sin) if self.absorbed else table, (cos, sin)

    def pack(self, hidden_states: torch.Tensor, table: Table) -> torch.Tensor:
        """What is cached of new tokens: [b, s, D] -> [b, 1, s, R j + width].

        Args:
            table: of what is cached, see `tables`.
        """
        feature = self.feature_factor(hidden_states).unsqueeze(1)
        head = self.head_factors(hidden_states)
        if self.norm is not None:
            scale = self.norm(self._heads(self._scaled(head), feature))  # [b, j or 1, s, 1]
            if self.norm.all_heads:
                feature = feature * scale
            else:
                scale = scale.permute(0, 2, 3, 1)
                head = scale if head is None else head * scale
        rotated = rotate(feature, table, self.rotation)
        if head is None:
            return rotated
        return torch.cat((head.flatten(2).unsqueeze(1), rotated), dim=-1)

    def _scaled(self, head: torch.Tensor | None) -> torch.Tensor | None:
        return head / self.rank if head is not None and self.shape.form == "linear" else head

    def head_factors(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Head factors of new tokens, [b, s, r, j], without 1 / R; None where all are 1."""
        return None

    def unpack(self, packed: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Head factors [b, t, r, j], scaled, or None, and features [b, 1, t, width]."""
        count = self.shape.key_head_factors(self.heads)
        if not count:
            return None, packed
        head, feature = packed.split((count, self.shape.width_k), dim=-1)
        head = head[:, 0].unflatten(-1, (self.rank, self.heads))
        return self._scaled(head), feature

    def expand(
        self, packed: torch.Tensor, table: Table | None = None, heads: Heads = None
    ) -> torch.Tensor:
        """Rotated keys for attention functions, from what is cached: [b, 1, t, R j + width].

        Args:
            heads: which of the keys, where each head has its own.

        Returns: [b, 1, t, width] shared by all queries if the gauge is absorbed into them and head
            factors are constant; [b, j, t, width] if it is absorbed and they are not; the keys k_j
            of the source's size, [b, j, t, d], otherwise.
        """
        head, feature = self.unpack(packed)
        if head is None and self.absorbed:
            return feature
        return self._heads(of_heads(head, heads, 3), feature, heads)

    def _heads(
        self, head: torch.Tensor | None, feature: torch.Tensor, heads: Heads = None
    ) -> torch.Tensor:
        """Σ_r a_{r,j} T_{r,j} b_r as heads [b, j, t, d]; [b, j, t, width] if T is absorbed."""
        if self.gauge is not None and self.rank == 1:
            keys = heads_of(feature, of_heads(self.matrix(), heads))
            return keys if head is None else keys * head[:, :, 0].mT[..., None]
        if head is not None:
            component = feature[:, 0].unflatten(-1, (2, self.rank, -1))
            if self.shape.key_gauge == "none":
                return torch.einsum("btrj,btcrp->bjtcp", head, component).flatten(-2)
            feature = torch.einsum("btrj,btcrp->bjtcrp", head, component).flatten(-3)
        if self.gauge is None:
            return feature
        return each_head(feature, of_heads(self.matrix(), heads).mT)

    def matrix(self) -> torch.Tensor:
        """The gauge as a real matrix for each head, [j, d, width]."""
        assert self.gauge is not None
        return self.gauge(self.rotary_pair, self.head_dim // 2)

    def component_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Queries in the space of the components: rotated queries [b, h, s, d] -> [b, h, s, width].

        Queries whose projection has absorbed the gauge are there already.
        """
        if self.absorbed:
            return query
        if self.gauge is None:
            return query.unflatten(-1, (2, -1))[..., self.rotary_pair].flatten(-2)
        return each_head(query, self.matrix())

    def scores(self, query: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """Scores [b, h, s, t], without softmax's scale, of component queries [b, h, s, width].

        Nothing of the size of the keys is made: Σ_r a_{r,j} ⟨q_r, b_r⟩.
        """
        head, feature = self.unpack(packed)
        if head is None:
            return query @ feature.mT
        query = query.unflatten(-1, (2, self.rank, -1)).unflatten(1, (self.heads, -1))
        feature = feature[:, 0].unflatten(-1, (2, self.rank, -1))
        by_rank = torch.einsum("bjnscrp,btcrp->bjnsrt", query, feature)
        return torch.einsum("bjnsrt,btrj->bjnst", by_rank, head).flatten(1, 2)


class ContextualKeys(RotatedKeys):
    """Rotated keys whose head factors depend on the token (`affine`, `linear`) and are cached."""

    def __init__(self, shape: LayerShape, hidden_size: int, heads: int, *rest: Any, **named: Any):
        super().__init__(shape, hidden_size, heads, *rest, **named)
        self.head_factor = nn.Linear(hidden_size, shape.rank_k * heads, bias=shape.form == "affine")

    def head_factors(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.head_factor(hidden_states).unflatten(-1, (self.rank, self.heads))


class LatentKeys(KeyLayout):
    """Features of all rotary pairs together, cached before rotation: k_j = T_j b + c_j.

    A real T_j mixes pairs and does not commute with RoPE: keys are rebuilt, normalised if the
    source does that, and rotated where they are used. The cache holds numbers, or rows of codes.
    """

    absorbed = False

    def __init__(
        self,
        shape: LayerShape,
        hidden_size: int,
        heads: int,
        head_dim: int,
        bias: bool,
        norm_eps: float | None,
    ):
        # The bias of coded components holds their mean: what remains is small enough for 16 bits.
        super().__init__(shape, hidden_size, heads, head_dim, bias or shape.coded, norm_eps)
        self.expanded_heads = heads
        self.coder = RowCoder(shape.key_layout) if shape.coded else None
        self.gauge: HeadGauge | BlockGauge
        if self.coder is None:
            self.gauge = HeadGauge(heads, head_dim, [shape.width_k], offset=True)
        else:
            self.gauge = BlockGauge(heads, head_dim, shape.key_block_widths, CLASSES - 1)

    def tables(self, table: Table) -> tuple[Table, Table]:
        """As `RotatedKeys.tables`: queries have the source's size, and keys are cached as such."""
        return table, table

    def pack(self, hidden_states: torch.Tensor, table: Table) -> torch.Tensor:
        """Components of new tokens: [b, s, D] -> [b, 1, s, width]."""
        return self.feature_factor(hidden_states).unsqueeze(1)

    def expand(self, packed: torch.Tensor, table: Table, heads: Heads = None) -> torch.Tensor:
        """Rotated keys [b, j, t, d] of features [b, 1, t, width].

        Args:
            table: of the features at the cached positions, [b or 1, 1, t, d].
            heads: which of the keys.

        Raises:
            ValueError: the table is of another number of positions.
        """
        if table[0].shape[2] != packed.shape[2]:  # one position would broadcast over all
            raise ValueError(
                f"{packed.shape[2]} cached positions, but position embeddings of "
                f"{table[0].shape[2]}: latent keys need the positions of everything cached"
            )
        keys = self.gauge(packed, heads=heads)
        if self.norm is not None:
            keys = keys * self.norm(keys, hide=True)
        return rotate(keys, table, self.rotation)
