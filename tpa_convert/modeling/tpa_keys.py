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
from .tpa_configuration import LayerShape
from .tpa_rotary import Table, rotate


def heads_of(
    features: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """Products [b, j, s, d] of features [b, 1, s, w] with a matrix for each head, [j, d, w], and
    the offset [j, d] of each.

    As a single product: a batched one would copy the features for every head.
    """
    bias = None if offset is None else offset.flatten()
    heads = nn.functional.linear(features[:, 0], weight.flatten(0, 1), bias)
    return heads.unflatten(-1, weight.shape[:2]).transpose(1, 2)


class PairGauge(nn.Module):
    """One complex number for each head and component, commuting with RoPE: weight [j, 2, P]."""

    def __init__(self, heads: int, pairs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, 2, pairs))

    def forward(
        self,
        pairs: torch.Tensor,
        conjugate: bool = False,
        spread: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Products [b, j, s, 2, P] of pairs [b, j or 1, s, 2, P] with the gauge or its conjugate,
        in halves.

        With `spread`, 1 where a component [P] is on a rotary pair [f], products of [b, 1, s, 2, P]
        are summed there: [b, j, s, 2 f].
        """
        if spread is not None:
            real, imaginary = (x[:, None] * spread for x in self.weight.unbind(-2))
            halves = (torch.cat(h, -1) for h in ((real, -imaginary), (imaginary, real)))
            return heads_of(pairs.flatten(-2), torch.cat(tuple(halves), 1))
        real, imaginary = pairs.unbind(-2)
        gauge_real, gauge_imaginary = self.weight[:, None].unbind(-2)
        if conjugate:
            gauge_imaginary = -gauge_imaginary
        return torch.stack(
            (
                real * gauge_real - imaginary * gauge_imaginary,
                real * gauge_imaginary + imaginary * gauge_real,
            ),
            dim=-2,
        )


class HeadGauge(nn.Module):
    """A real matrix for each head, weight [j, d, width], and perhaps an offset [j, d]."""

    def __init__(self, heads: int, head_dim: int, width: int, offset: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_dim, width))
        self.offset = nn.Parameter(torch.zeros(heads, head_dim)) if offset else None

    def forward(self, features: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """Heads [b, j, s, d] of features [b, j or 1, s, width].

        Args:
            before: the weight of another gauge [j, d, w], whose features [b, 1, s, w] come first.
        """
        weight = self.weight if before is None else torch.cat((before, self.weight), -1)
        if features.shape[1] == 1:
            return heads_of(features, weight, self.offset)
        heads = features @ weight.mT
        return heads if self.offset is None else heads + self.offset[:, None]


class BlockGauge(nn.Module):
    """As `HeadGauge`, with features that make heads on blocks of rotary pairs: weight [j, d / B,
    width].

    Features that belong to no block come last and have a gauge of their own, `shared`.

    Args:
        widths: features of each of the B blocks.
        shared: features of none.
    """

    def __init__(self, heads: int, head_dim: int, widths: list[int], shared: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, head_dim // len(widths), sum(widths)))
        self.widths = widths
        self.shared = HeadGauge(heads, head_dim, shared, offset=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Heads [b, j, s, d] of features [b, 1, s, all widths]."""
        if len(self.widths) == 1:  # a single product
            return self.shared(features, self.weight)
        *blocks, rest = features.split((*self.widths, self.shared.weight.shape[-1]), dim=-1)
        weights = self.weight.split(self.widths, dim=-1)
        parts = [heads_of(x, weight) for x, weight in zip(blocks, weights, strict=True)]
        halves = torch.stack(parts, dim=-2).unflatten(-1, (2, -1))  # [b, j, s, B, 2, f / B]
        return halves.transpose(-3, -2).flatten(-3) + self.shared(rest)


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
        least = self.least * weight.abs().max()
        return weight, torch.where(weight.abs() < least, least, weight)

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

    def query_table(self, table: Table) -> Table:
        """The table that queries are rotated by: of their components, if the gauge is absorbed."""
        return self.component_table(table) if self.absorbed else table

    def component_table(self, table: Table) -> Table:
        """Cosines and sines on the pairs of the components, [b, 1, s, P]."""
        cos, sin = table
        return cos[..., self.rotary_pair], sin[..., self.rotary_pair]

    def pack(self, hidden_states: torch.Tensor, table: Table) -> torch.Tensor:
        """What is cached of new tokens: [b, s, D] and their table -> [b, 1, s, R j + width]."""
        feature = self.feature_factor(hidden_states).unsqueeze(1)
        head = self.head_factors(hidden_states)
        if self.norm is not None:
            scale = self.norm(self._heads(self._scaled(head), feature))  # [b, j or 1, s, 1]
            if self.norm.all_heads:
                feature = feature * scale
            else:
                head = head * scale.permute(0, 2, 3, 1)
        rotated = rotate(feature, self.component_table(table))
        if not self.shape.key_head_factors(self.heads):
            return rotated
        return torch.cat((head.flatten(2).unsqueeze(1), rotated), dim=-1)

    def _scaled(self, head: torch.Tensor) -> torch.Tensor:
        return head / self.rank if self.shape.form == "linear" else head

    def head_factors(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Head factors of new tokens, [b, s, r, j], without 1 / R."""
        return hidden_states.new_ones(*hidden_states.shape[:2], self.rank, self.heads)

    def unpack(self, packed: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Head factors [b, t, r, j], scaled, or None, and features [b, 1, t, width]."""
        count = self.shape.key_head_factors(self.heads)
        if not count:
            return None, packed
        head, feature = packed.split((count, self.shape.width_k), dim=-1)
        head = head[:, 0].unflatten(-1, (self.rank, self.heads))
        return self._scaled(head), feature

    def expand(self, packed: torch.Tensor, table: Table | None = None) -> torch.Tensor:
        """Rotated keys for attention functions, from what is cached: [b, 1, t, R j + width].

        Returns: [b, 1, t, width] shared by all queries if the gauge is absorbed into them and head
            factors are constant; [b, j, t, width] if it is absorbed and they are not; the keys k_j
            of the source's size, [b, j, t, d], otherwise.
        """
        head, feature = self.unpack(packed)
        if head is None and self.absorbed:
            return feature
        return self._heads(head, feature)

    def _heads(self, head: torch.Tensor | None, feature: torch.Tensor) -> torch.Tensor:
        """Σ_r a_{r,j} T_{r,j} b_r as heads [b, j, t, d]; [b, j, t, width] if T is absorbed."""
        pairs = feature.unflatten(-1, (2, -1))  # [b, 1, t, 2, P]
        if self.gauge is not None and not self.shape.contextual:
            pair = torch.arange(self.head_dim // 2, device=feature.device)[:, None]
            spread = (pair == self.rotary_pair).to(feature.dtype)
            keys = self.gauge(pairs, spread=spread)
            return keys if head is None else keys * head[:, :, 0].mT[..., None]
        if head is not None:
            component = pairs[:, 0].unflatten(-1, (self.rank, -1))
            if self.shape.key_gauge == "none":
                return torch.einsum("btrj,btcrp->bjtcp", head, component).flatten(-2)
            pairs = torch.einsum("btrj,btcrp->bjtcrp", head, component).flatten(-2)
        if self.gauge is None:
            return pairs.flatten(-2)
        pairs = self.gauge(pairs)  # [b, j, t, 2, P]
        keys = pairs.new_zeros(*pairs.shape[:-1], self.head_dim // 2)
        return keys.index_add(-1, self.rotary_pair, pairs).flatten(-2)

    def component_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Queries in the space of the components: rotated queries [b, h, s, d] -> [b, h, s, width].

        Queries whose projection has absorbed the gauge are there already.
        """
        if self.absorbed:
            return query
        pairs = query.unflatten(-1, (2, -1))[..., self.rotary_pair]
        if self.gauge is not None:
            grouped = pairs.unflatten(1, (self.heads, -1))  # [b, j, n, s, 2, P]
            merged = self.gauge(grouped.flatten(2, 3), conjugate=True)
            pairs = merged.unflatten(2, grouped.shape[2:4]).flatten(1, 2)
        return pairs.flatten(-2)

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
            self.gauge = HeadGauge(heads, head_dim, shape.width_k, offset=True)
        else:
            classes = self.coder.width - shape.width_k
            self.gauge = BlockGauge(heads, head_dim, shape.key_block_widths, classes)

    def query_table(self, table: Table) -> Table:
        """As `RotatedKeys.query_table`: queries have the source's size."""
        return table

    def pack(self, hidden_states: torch.Tensor, table: Table) -> torch.Tensor:
        """Components of new tokens: [b, s, D] -> [b, 1, s, width]."""
        return self.feature_factor(hidden_states).unsqueeze(1)

    def expand(self, packed: torch.Tensor, table: Table) -> torch.Tensor:
        """Rotated keys [b, j, t, d] of features [b, 1, t, width].

        Args:
            table: of the cached positions, [b or 1, 1, t, f].

        Raises:
            ValueError: the table is of another number of positions.
        """
        if table[0].shape[2] != packed.shape[2]:  # one position would broadcast over all
            raise ValueError(
                f"{packed.shape[2]} cached positions, but position embeddings of "
                f"{table[0].shape[2]}: latent keys need the positions of everything cached"
            )
        keys = self.gauge(packed)
        if self.norm is not None:
            keys = keys * self.norm(keys, hide=True)
        return rotate(keys, table)
