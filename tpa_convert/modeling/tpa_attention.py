"""Tensor Product Attention (TPA, arXiv 2501.06425) in the place of a source model's attention.

Shape suffixes and einsum letters are those of `tpa_keys`.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .tpa_cache import (
    cache_grid,
    fold,
    given_cache,
    refuse_quantised,
    tokens_in,
    unfold,
)
from .tpa_coded import CodedLayer
from .tpa_configuration import LayerShape, source_head_dim, source_key_value_heads
from .tpa_decode import decode_rebuilt, decode_rotated
from .tpa_gauges import Heads
from .tpa_kernels import Sources, find_kernel, part_of
from .tpa_keys import ContextualKeys, LatentKeys, RotatedKeys
from .tpa_prefill import eager_attention_forward, rebuilt_attention
from .tpa_rotary import (
    LayerRotary,
    Table,
    feature_table,
    paged_positions,
    pair_table,
    pairs_of,
    rotate,
    slot_positions,
)
from .tpa_source import (
    AttentionNames,
    norm_epsilon,
    norm_width,
    normalised_together,
    sliding_window,
)
from .tpa_values import ContextualValues, StaticValues


class FactorizedQuery(nn.Module):
    """Factored queries Q(x) = 1/R_Q A_Q(x)ᵀ B_Q(x) (paper, eq. 3.1); output [..., h * d]."""

    def __init__(self, hidden_size: int, heads: int, head_dim: int, rank: int, bias: bool):
        super().__init__()
        self.rank, self.heads = rank, heads
        self.head_factor = nn.Linear(hidden_size, rank * heads, bias=False)
        self.feature_factor = nn.Linear(hidden_size, rank * head_dim, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        head = self.head_factor(hidden_states).unflatten(-1, (self.rank, self.heads))
        feature = self.feature_factor(hidden_states).unflatten(-1, (self.rank, -1))
        return torch.einsum("bsrh,bsrd->bshd", head, feature).flatten(-2) / self.rank


class TPAAttention(nn.Module):
    """Attention whose keys and values are sums of products of head and feature factors.

        k_j(x) = s_K Σ_r a^K_{r,j}(x) T_{r,j} b^K_r(x)
        v_j(x) = s_V Σ_r a^V_{r,j}(x) U_{r,j} b^V_r(x)

    as eq. 3.1 of arXiv 2501.06425, to which the constant maps T and U (the gauge) are added; s =
    1 / R for `linear` head factors and 1 otherwise. With T = U = 1 this is the layer of the paper.
    The factors are cached; `tpa_keys` and `tpa_values` say how.

    Scale, window, soft-cap, dropout and the norm of the queries are those of the attention module
    of the source whose place it takes.
    """

    def __init__(self, config: Any, layer_idx: int, source: Any, names: AttentionNames):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.shape = shape = LayerShape(**config.tpa_layers[layer_idx])
        self.num_heads = heads = config.num_attention_heads
        self.num_key_value_heads = groups = source_key_value_heads(config)
        self.head_dim = head_dim = source_head_dim(config)
        self.scaling: float = getattr(source, "scaling", head_dim**-0.5)
        self.attention_dropout = getattr(source, "attention_dropout", 0.0)
        self.is_causal = getattr(source, "is_causal", True)
        self.sliding_window = sliding_window(source, config, layer_idx)
        self.softcap = getattr(source, "attn_logit_softcapping", None)

        hidden_size = config.hidden_size
        query_bias = names.projection(source, "query").bias is not None
        key_norm = getattr(source, names.key_norm, None)
        if normalised_together(key_norm, head_dim, groups) != shape.key_norm:
            raise ValueError(f"layer {layer_idx}: key_norm is not that of the source")
        keys: type[RotatedKeys | LatentKeys] = RotatedKeys
        if shape.latent_keys or shape.contextual:
            keys = LatentKeys if shape.latent_keys else ContextualKeys
        self.keys = keys(
            shape,
            hidden_size,
            groups,
            head_dim,
            bias=names.projection(source, "key").bias is not None,
            norm_eps=None if key_norm is None else norm_epsilon(key_norm),
        )
        self.values = (ContextualValues if shape.contextual else StaticValues)(
            shape,
            hidden_size,
            groups,
            head_dim,
            bias=names.projection(source, "value").bias is not None,
        )
        self.q_norm = getattr(source, names.query_norm, None)
        self.query_norm_width = 0 if self.q_norm is None else norm_width(self.q_norm)
        self.table_order = names.table_order(source)
        # What tables follow from beside positions: layers that agree in it share them.
        self.table_kind = self.table_order, self.keys.absorbed, shape.width_k, shape.key_pairs
        if shape.rank_q is None:
            query_width = shape.width_k if self.keys.absorbed else head_dim
            self.q_proj: nn.Module = nn.Linear(hidden_size, heads * query_width, bias=query_bias)
        else:
            self.q_proj = FactorizedQuery(hidden_size, heads, head_dim, shape.rank_q, query_bias)
        self.o_proj = nn.Linear(
            heads * self.values.output_width,
            hidden_size,
            bias=getattr(source, names.output).bias is not None,
        )
        self.expanded_heads = max(self.keys.expanded_heads, self.values.expanded_heads)
        self.num_key_value_groups = heads // self.expanded_heads  # read by attention functions
        self.rotary_emb: LayerRotary | None = None
        self.kernel = find_kernel()
        self.coded = CodedLayer() if shape.coded else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Table,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the source's attention; the cache has the name that the installed transformers uses.

        Args:
            hidden_states: [b, s, D].
            position_embeddings: cosines and sines of the new tokens, [b, s, rotated dims].
            attention_mask: as the attention function takes it.

        Returns: output [b, s, D], and the attention weights if the function gives them.
        """
        cache = given_cache(kwargs, pop=True)
        keys: RotatedKeys | LatentKeys = part_of(self, "keys")
        values: StaticValues = part_of(self, "values")
        batch, length, _ = hidden_states.shape
        latent, stock = isinstance(keys, LatentKeys), isinstance(cache, Cache)
        if self.rotary_emb is None:
            of_pass = self.known_of(position_embeddings)
        else:
            of_pass = self.rotary_emb.shared(
                position_embeddings[:1], self.table_kind, lambda: self.known_of(position_embeddings)
            )
        (table, query_table, key_table), implementation = of_pass
        held = None if cache is None else tokens_in(cache, self.layer_idx)
        on_kernels, coded = self.coded, None  # tables of kernels
        features = together = None  # of new tokens: keys' and values', and those of both
        taken = room = None
        if on_kernels is not None and cache is not None and length == 1:
            projections = (
                part_of(self, "q_proj"),
                part_of(keys, "feature_factor"),
                part_of(values, "feature_factor"),
            )
            normalise = None if self.q_norm is None else self.normalised_queries
            of_token = query_table, keys, values, cache, held, self.layer_idx, normalise
            taken = on_kernels.take_in(hidden_states, projections, *of_token)
        if taken is not None:
            coded, query, key, value, room = taken
        else:
            query = part_of(self, "q_proj")(hidden_states)
            if self.q_norm is not None:
                query = self.normalised_queries(query)
            query = query.view(batch, length, self.num_heads, -1)
            if on_kernels is not None and cache is not None:
                coded = on_kernels.prepare(query, keys, values, cache, held)
            if on_kernels is None or coded is None:
                query = rotate(query.transpose(1, 2), query_table, keys.rotation)
                key, value, features = self.pack(hidden_states, key_table, cached=cache is not None)
            else:
                given = hidden_states, query, query_table, keys, values
                packed = on_kernels.pack(coded, *given, cache, self.layer_idx)
                query, key, value, room, together = packed
        of_slots = None
        if cache is not None:
            prompt = stock and length > 1 and held == 0
            if latent and stock and not prompt:  # before the cache counts the new tokens
                known = hidden_states, position_embeddings, attention_mask
                of_slots = self.table_of_slots(cache, *known, kwargs)
            if room is not None:
                key, value = room.take(cache.layers[self.layer_idx], length)
            else:
                key, value = self.update(cache, key, value, hidden_states.dtype, kwargs, not held)
            if prompt and key.shape[2] > length:  # free slots lie behind it
                key, value = key[:, :, :length], value[:, :, :length]
                if isinstance(attention_mask, torch.Tensor):
                    attention_mask = attention_mask[..., :length]
            if latent and not stock:
                of_slots = self.table_of_pages(key.shape[2], hidden_states, kwargs)
            if length == 1 or key.shape[2] != length:  # something was cached before
                features = together = None
        one = length == 1 and (cache is None or stock)
        output = weights = projected = None
        if one and features is None and on_kernels is not None and coded is not None:
            # Who hooks into this module may want weights, which only eager attention gives.
            eager = implementation == "eager" and self.softcap and not self._forward_hooks
            if eager or (implementation == "sdpa" and not self.softcap):
                pairs = pairs_of(table) if of_slots is None else of_slots
                cached = query, key, value, attention_mask, pairs, part_of(self, "o_proj")
                projected = on_kernels.decode(coded, *cached, self.scaling, self.softcap)
        if projected is None and of_slots is not None:
            table = self.features_of(of_slots)
        if self.rotary_emb is not None:
            self.rotary_emb.done()
        if projected is not None:
            return projected, None
        if together is None:
            key, value = features or self.unpack(key, value, query.dtype)
        if one and implementation == "sdpa" and not self.softcap:
            output = self.decode(query, key, value, attention_mask, table)
        if output is None:
            attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                implementation, eager_attention_forward
            )
            if self.sliding_window is not None:
                kwargs["sliding_window"] = self.sliding_window
            if self.softcap is not None:
                kwargs["softcap"] = self.softcap
            if together is None:
                parts = self.mixed_parts(key, value)
                value = torch.cat(parts, -1) if len(parts) > 1 else value

            def expand(heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
                if together is not None:
                    assert on_kernels is not None
                    assert coded is not None
                    return on_kernels.expand(coded, together, table, keys, values, heads)
                return keys.expand(key, table, heads), values.expand(value, heads)

            output, weights = rebuilt_attention(
                self,
                attention_interface,
                query,
                key,
                expand,
                attention_mask,
                one_width=implementation == "sdpa",
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
            if output.shape[-1] != values.output_width:
                output = output[..., : values.output_width]
        return part_of(self, "o_proj")(output.reshape(batch, length, -1)), weights

    def normalised_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Queries [b, s, h · d] by the norm of the source, [b, s, heads or 1, ...]."""
        assert self.q_norm is not None
        return self.q_norm(query.view(*query.shape[:2], -1, self.query_norm_width))

    def train(self, mode: bool = True) -> "TPAAttention":
        """What decoding keeps of the parameters is made anew after training, but not where nothing
        changes: many call `eval` before every use."""
        if mode or self.training:
            Sources.trained()
        return super().train(mode)

    def known_of(self, position_embeddings: Table) -> tuple[tuple[Table, Table, Table], str]:
        """What layers share in a forward pass: `tables`, and the name of the attention function,
        for which the config takes the host as long as a launch."""
        return self.tables(position_embeddings), self.config._attn_implementation

    def tables(self, position_embeddings: Table) -> tuple[Table, Table, Table]:
        """Tables of the new tokens: that of the features of a head, [b, 1, s, d], and those of
        `keys.tables`."""
        pairs = pair_table(position_embeddings, self.head_dim // 2, self.table_order)
        table = feature_table(pairs)
        return table, *self.keys.tables(table)

    def pack(
        self, hidden_states: torch.Tensor, table: Table, cached: bool
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Keys and values of new tokens, [b, 1, s, ...] each, and their features.

        Args:
            hidden_states: [b, s, D].
            table: that keys are rotated by, see `tables`.
            cached: what is coded comes in rows of bytes, as the cache holds it. Otherwise it comes
                in features, with gradients.

        Returns: keys, values, and the features that `unpack` would give for them if they are coded
            and there are several tokens: all that attention needs where nothing was cached before.
        """
        keys, values = self.keys, self.values
        key_coder, value_coder = keys.coder, values.coder
        key = keys.pack(hidden_states, table)
        if key_coder is None or value_coder is None:
            return key, values.pack(hidden_states), None
        if not cached:
            key = key_coder(key)
            value = value_coder(values.pack(hidden_states, key))
            return key, value, (key, value)
        several = key.shape[2] > 1
        key, key_features = key_coder(key, rows=True, features=several or self.shape.predict_values)
        value = values.pack(hidden_states, key_features)
        value, value_features = value_coder(value, rows=True, features=several)
        return key, value, (key_features, value_features) if several else None

    def unpack(
        self, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the cache as features in `dtype`; what is not coded stays as it is."""
        if self.keys.coder is None or self.values.coder is None:
            return key, value
        return self.keys.coder(key, dtype=dtype), self.values.coder(value, dtype=dtype)

    def mixed_parts(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The features that values are made of: where they are predicted, those of the keys too."""
        return (value, key) if self.shape.predict_values else (value,)

    def update(
        self,
        cache: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        dtype: torch.dtype,
        kwargs: dict[str, Any],
        first: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds packed keys and values to the cache of a model in `dtype`: all that it holds of
        them. The cache may be looked at if they are the `first` ones."""
        if isinstance(cache, Cache):
            if first and self.coded is not None:
                refuse_quantised(cache, self.layer_idx)
        elif "kwargs" not in signature(cache.update).parameters:
            raise ValueError("continuous batching of TPA models needs transformers 5.20 or newer")
        widths, packed = (key.shape[-1], value.shape[-1]), key.dtype
        heads = self.num_key_value_heads, self.head_dim
        grid = cache_grid(cache, self.layer_idx, heads, widths)
        if grid is None:
            return cache.update(key, value, self.layer_idx, kwargs=kwargs)
        # Its numbers are of the model's type, which holds bytes exactly.
        folded = (fold(x, grid).to(dtype) for x in (key, value))
        held = cache.update(*folded, self.layer_idx, kwargs=kwargs)
        key, value = (unfold(x, n).to(packed) for x, n in zip(held, widths, strict=True))
        return key, value

    def table_of_slots(
        self,
        cache: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Table,
        attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> Table | None:
        """The table of pairs, [b or 1, t, f], at all positions that a cache of transformers will
        hold with the new tokens in it, for keys that are rotated where they are used; None if it
        holds no others."""
        length, positions = hidden_states.shape[1], kwargs.get("position_ids")
        slots_t = cache.get_mask_sizes(length, self.layer_idx)[0]
        if slots_t == length:
            return None
        assert self.rotary_emb is not None, "set by replace_attention"
        device = hidden_states.device
        given = cache, self.layer_idx, length, positions, attention_mask, device
        return self.rotary_emb.shared(
            (position_embeddings[0], positions, attention_mask),
            (self.table_order, slots_t, length, device),
            lambda: self.table_at(hidden_states, slot_positions(*given)),
        )

    def table_of_pages(
        self, slots: int, hidden_states: torch.Tensor, kwargs: dict[str, Any]
    ) -> Table | None:
        """The same of the `slots` that a paged cache has returned."""
        if slots == hidden_states.shape[1]:
            return None
        starts_q, starts_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        positions = paged_positions(starts_q, starts_k, kwargs["position_ids"], slots)
        return self.table_at(hidden_states, positions)

    def table_at(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> Table:
        """The table of pairs at positions [b or 1, t], in the type and place of what comes in."""
        assert self.rotary_emb is not None, "set by replace_attention"
        table = self.rotary_emb(hidden_states, positions)
        if table[0].device != hidden_states.device:
            table = table[0].to(hidden_states.device), table[1].to(hidden_states.device)
        cos, sin = pair_table(table, self.head_dim // 2, self.table_order)
        return cos[:, 0], sin[:, 0]

    def features_of(self, pairs: Table) -> Table:
        """The table of features [b, 1, t, d] in one of pairs [b, t, f]."""
        assert self.rotary_emb is not None, "set by replace_attention"
        cos, sin = pairs
        given = cos[:, None], sin[:, None]
        return self.rotary_emb.shared(pairs, (cos.shape,), lambda: feature_table(given))

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        table: Table,
    ) -> torch.Tensor:
        """Attention of one query position; keys and values are not expanded, except latent keys.

        Args:
            query: rotated queries [b, h, 1, width_k] (absorbed gauge) or [b, h, 1, d].
            key, value: the cache of this layer, or features of rows, [b, 1, t, ...].
            attention_mask: boolean or additive, [b, 1, 1, t], or None to attend to everything.
            table: see `update`.

        Returns: what the output projection reads, [b, 1, h, width_v or d].
        """
        keys, values, scaling = self.keys, self.values, self.scaling
        if isinstance(keys, LatentKeys):
            parts = self.mixed_parts(key, value)
            rebuilt = keys.expand(key, table)
            output = decode_rebuilt(query, rebuilt, parts, attention_mask, values, scaling)
        else:
            cached = query, key, value, attention_mask
            output = decode_rotated(*cached, keys, values, self.kernel, scaling)
        return output.transpose(1, 2)
