"""Tensor Product Attention (TPA, arXiv 2501.06425) for LLaMA-style decoders.

This file imports torch and transformers only: it is exported beside the weights of a converted
model.

Shape suffixes and einsum letters:
    b  batch                          h  query heads (num_attention_heads)
    s  query positions                j  key/value heads (num_key_value_heads)
    t  cached positions               n  query heads per key/value head, h = j * n
    r  rank (component)               d  head_dim of the source, d = 2 f
    p  rotary pairs per component     c  real or imaginary part of a rotary pair (2)
    P  rotary pairs of all components, width_k = 2 P
    w  value features of all components, width_v = r * e
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)

from .configuration_tpa import TPAConfig


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of half-split features `x` [..., 2 P]; `cos`, `sin` broadcast against it."""
    return x * cos + rotate_half(x) * sin


CACHE_NAMES = ("past_key_values", "cache")  # transformers renamed it in 5.24


def given_cache(arguments: dict, pop: bool = False) -> Cache | None:
    """The cache among keyword arguments, whatever it is called there; `pop` takes it out."""
    found = [arguments.pop(n, None) if pop else arguments.get(n) for n in CACHE_NAMES]
    return next((cache for cache in found if cache is not None), None)


def cached_positions(
    cache: Cache,
    hidden_states: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Positions [b or 1, t] of everything that `cache` will hold after a call with these inputs.

    New slots are where `position_ids` says. Of older ones, those attended to follow each other up
    to the new ones, as generation counts them: padding, on the left or between, takes no position.
    Free slots of a static cache count as the last, since RoPE scaling may depend on the largest
    position; nothing attends to them.

    Args:
        hidden_states: [b, s, D].
        position_ids: of the inputs, [b or 1, s], or None if they follow the cache's slots.
        attention_mask: of the slots [b, t] or less, or as attention takes it, [b, 1, s, t].
    """
    length, first = hidden_states.shape[1], cache.get_seq_length()
    slots = torch.arange(cache.get_mask_sizes(length, 0)[0], device=hidden_states.device)[None]
    last = first + length - 1
    if position_ids is None:
        return slots.clamp(max=last)
    attended = slots <= last
    if isinstance(attention_mask, torch.Tensor):
        mask = attention_mask if attention_mask.ndim == 2 else attention_mask[:, 0, -1]
        mask = mask == 0 if mask.is_floating_point() else mask.bool()
        attended = nn.functional.pad(mask, (0, slots.shape[1] - mask.shape[1]))
    batch = max(len(position_ids), len(attended))
    count = attended.cumsum(-1).expand(batch, -1)
    given = position_ids[:, (slots[0] - first).clamp(0, length - 1)].expand(batch, -1)
    new = (slots >= first) & (slots <= last)
    # Any new slot that is attended to tells what to add to a row's counts.
    known = torch.where(new & attended, slots, -1).amax(-1, keepdim=True)
    known = torch.where(known < 0, last, known).expand(batch, -1)
    return torch.where(new, given, count + given.gather(1, known) - count.gather(1, known))


def complex_product(x: torch.Tensor, gauge: torch.Tensor, conjugate: bool = False) -> torch.Tensor:
    """Product of half-split complex vectors `x` and `gauge` (or its conjugate): [..., 2, P]."""
    real, imaginary = x.unbind(-2)
    gauge_real, gauge_imaginary = gauge.unbind(-2)
    if conjugate:
        gauge_imaginary = -gauge_imaginary
    return torch.stack(
        (
            real * gauge_real - imaginary * gauge_imaginary,
            real * gauge_imaginary + imaginary * gauge_real,
        ),
        dim=-2,
    )


class FactorizedQuery(nn.Module):
    """Factored queries Q(x) = 1/R_Q A_Q(x)ᵀ B_Q(x) (paper, eq. 3.1); output [..., h * d]."""

    def __init__(self, config: TPAConfig, rank: int):
        super().__init__()
        self.rank, self.num_heads = rank, config.num_attention_heads
        self.head_factor = nn.Linear(config.hidden_size, self.rank * self.num_heads, bias=False)
        self.feature_factor = nn.Linear(
            config.hidden_size, self.rank * config.head_dim, bias=config.attention_bias
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        head = self.head_factor(hidden_states).unflatten(-1, (self.rank, self.num_heads))
        feature = self.feature_factor(hidden_states).unflatten(-1, (self.rank, -1))
        return torch.einsum("bsrh,bsrd->bshd", head, feature).flatten(-2) / self.rank


class TPAAttention(nn.Module):
    """Tensor Product Attention with a gauge.

        k_j(x) = s_K Σ_r a^K_{r,j}(x) T_{r,j} b^K_r(x)
        v_j(x) = s_V Σ_r a^V_{r,j}(x) U_{r,j} b^V_r(x)

    as eq. 3.1 of arXiv 2501.06425, to which the constant maps T (one complex number per rotary
    pair, so that it commutes with RoPE) and U are added; s = 1 / R for `linear` head factors and 1
    otherwise. With T = U = 1 this is the layer of the paper. The cache holds the head factors a
    (unless they are constant) and the rotated feature factors b of each token, packed as one head:
    [b, 1, t, R * j + width].

    With latent keys, T is a real [d, width_k] matrix per head that mixes rotary pairs, and the keys
    have a constant term c that costs no cache: k_j(x) = T_j b^K(x) + c_j. It does not commute with
    RoPE, so b is cached before rotation and the keys are rebuilt and rotated where they are used.
    """

    rotary_pair: torch.Tensor

    def __init__(self, config: TPAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.shape = config.layer_shape(layer_idx)
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        assert config.attention_scale is not None  # TPAConfig fills it in
        self.scaling = config.attention_scale
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        shape, hidden_size, bias = self.shape, config.hidden_size, config.attention_bias
        self.absorbed = shape.gauge == "absorbed"
        shared = self.absorbed and not shape.contextual and not shape.latent_keys
        expanded_heads = 1 if shared else self.num_key_value_heads
        # read by the attention functions
        self.num_key_value_groups = self.num_heads // expanded_heads

        # whether queries are in the space of the key components
        self.absorbed_queries = self.absorbed and not shape.latent_keys
        query_width = shape.width_k if self.absorbed_queries else self.head_dim
        output_width = shape.width_v if self.absorbed else self.head_dim
        if config.rank_q is None:
            self.q_proj: nn.Module = nn.Linear(hidden_size, self.num_heads * query_width, bias=bias)
        else:
            self.q_proj = FactorizedQuery(config, config.rank_q)
        self.k_feature_factor = nn.Linear(hidden_size, shape.width_k, bias=bias)
        self.v_feature_factor = nn.Linear(hidden_size, shape.width_v, bias=bias)
        if shape.contextual:
            heads, head_bias = self.num_key_value_heads, shape.form == "affine"
            self.k_head_factor = nn.Linear(hidden_size, shape.rank_k * heads, bias=head_bias)
            self.v_head_factor = nn.Linear(hidden_size, shape.rank_v * heads, bias=head_bias)
        if shape.latent_keys:
            self.key_gauge = nn.Parameter(
                torch.zeros(self.num_key_value_heads, self.head_dim, shape.width_k)
            )
            self.key_offset = nn.Parameter(torch.zeros(self.num_key_value_heads, self.head_dim))
        elif shape.gauge == "applied":
            self.key_gauge = nn.Parameter(
                torch.zeros(self.num_key_value_heads, 2, shape.width_k // 2)
            )
        if shape.gauge == "applied":
            self.value_gauge = nn.Parameter(
                torch.zeros(self.num_key_value_heads, self.head_dim, shape.width_v)
            )
        self.o_proj = nn.Linear(
            self.num_heads * output_width, hidden_size, bias=config.attention_output_bias
        )
        if not shape.latent_keys:
            # the rotary pair of the source on which each key component lives
            pairs = torch.arange(shape.width_k // 2) % (self.head_dim // 2)
            self.register_buffer("rotary_pair", pairs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cached_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As LlamaAttention's; `cached_position_embeddings` are those of everything in the cache
        after this call, [b, t, d], which latent keys need if there was something before. The cache
        comes under the name that the installed transformers has for it (`CACHE_NAMES`)."""
        cache = given_cache(kwargs, pop=True)
        input_shape = hidden_states.shape[:-1]
        table = self.rotary_table(position_embeddings)
        key_table = table if self.shape.latent_keys else self.component_table(table)

        query = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query = rotate_pairs(query, *(key_table if self.absorbed_queries else table))
        key = self.k_feature_factor(hidden_states).unsqueeze(1)
        if not self.shape.latent_keys:
            key = rotate_pairs(key, *key_table)
        elif cached_position_embeddings is not None:
            key_table = self.rotary_table(cached_position_embeddings)
        value = self.v_feature_factor(hidden_states).unsqueeze(1)
        if self.shape.contextual:
            key = torch.cat((self.k_head_factor(hidden_states).unsqueeze(1), key), dim=-1)
            value = torch.cat((self.v_head_factor(hidden_states).unsqueeze(1), value), dim=-1)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        implementation = self.config._attn_implementation
        weights = None
        if query.shape[2] == 1 and implementation == "sdpa":
            output = self.decode(query, key, value, attention_mask, key_table).transpose(1, 2)
        else:
            attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                implementation, eager_attention_forward
            )
            output, weights = attention_interface(
                self,
                query,
                self.expand_keys(key, key_table),
                self.expand_values(value),
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        return self.o_proj(output.reshape(*input_shape, -1)), weights

    @staticmethod
    def rotary_table(
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the source [b, s, d] for all heads alike: [b, 1, s, d]."""
        cos, sin = position_embeddings
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def component_table(
        self, table: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [b, 1, s, d] on the pairs of the key components: [b, 1, s, 2 P]."""
        cos, sin = (part[..., self.rotary_pair].repeat(1, 1, 1, 2) for part in table)
        return cos, sin

    def unpack(
        self, packed: torch.Tensor, rank: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Head factors [b, t, r, j], scaled, and feature factors [b, t, width] of the cache."""
        head, feature = packed[:, 0].split((packed.shape[-1] - width, width), dim=-1)
        head = head.unflatten(-1, (rank, self.num_key_value_heads))
        return head / rank if self.shape.form == "linear" else head, feature

    def expand_keys(
        self, packed: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Rotated keys for the attention functions, from the packed cache.

        With an absorbed gauge they have width_k numbers and, if head factors are constant, one head
        shared by all queries; otherwise they are the keys k_j of the source's size: [b, j, t, d].

        Args:
            packed: [b, 1, t, R * j + width_k].
            table: cosines and sines of the cached positions, [b, 1, t, d], for latent keys.
        """
        shape = self.shape
        if shape.latent_keys:
            if table[0].shape[2] != packed.shape[2]:  # one position would broadcast over all
                raise ValueError(
                    f"{packed.shape[2]} cached positions, but position embeddings of "
                    f"{table[0].shape[2]}: latent keys need cached_position_embeddings"
                )
            keys = nn.functional.linear(
                packed[:, 0], self.key_gauge.flatten(0, 1), self.key_offset.flatten()
            )
            keys = keys.unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
            return rotate_pairs(keys, *table)
        if shape.contextual:
            head_btrj, feature = self.unpack(packed, shape.rank_k, shape.width_k)
            feature = feature.unflatten(-1, (2, shape.rank_k, -1))
            if shape.gauge == "none":
                return torch.einsum("btrj,btcrp->bjtcp", head_btrj, feature).flatten(-2)
            pairs = torch.einsum("btrj,btcrp->bjtcrp", head_btrj, feature).flatten(-2)
        else:
            pairs = packed.unflatten(-1, (2, -1))
        if self.absorbed:
            return pairs.flatten(-2)
        pairs = complex_product(pairs, self.key_gauge[:, None])  # [b, j, t, 2, P]
        keys = pairs.new_zeros(*pairs.shape[:-1], self.head_dim // 2)
        return keys.index_add(-1, self.rotary_pair, pairs).flatten(-2)

    def expand_values(self, packed: torch.Tensor) -> torch.Tensor:
        """Values for the attention functions, laid out as `expand_keys` says.

        Returns: [b, 1 or j, t, width_v or d].
        """
        shape, values = self.shape, packed
        if shape.contextual:
            head_btrj, feature = self.unpack(packed, shape.rank_v, shape.width_v)
            feature = feature.unflatten(-1, (shape.rank_v, -1))
            if shape.gauge == "none":
                return torch.einsum("btrj,btrd->bjtd", head_btrj, feature)
            values = torch.einsum("btrj,btre->bjtre", head_btrj, feature).flatten(-2)
        if not self.absorbed:
            return values @ self.value_gauge.mT
        # as many heads as the keys have
        return values.expand(-1, self.num_key_value_heads, -1, -1) if shape.latent_keys else values

    def decode(
        self,
        query: torch.Tensor,
        packed_key: torch.Tensor,
        packed_value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        key_table: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Attention of one query position on the packed cache; keys and values are not expanded,
        except latent keys.

        score = c Σ_r a_{r,j} ⟨q_r, b_r⟩ and out_r = Σ_t p_t a_{r,j} b_r, then U.

        Args:
            query: rotated queries [b, h, 1, width_k] (absorbed gauge) or [b, h, 1, d].
            packed_key, packed_value: the cache of this layer, [b, 1, t, R * j + width].
            attention_mask: boolean or additive, [b, 1, 1, t], or None to attend to everything.
            key_table: see `expand_keys`.

        Returns: [b, h, 1, width_v] (absorbed gauge) or [b, h, 1, d].
        """
        shape, heads = self.shape, self.num_key_value_heads
        if not (self.absorbed or shape.latent_keys):
            query = query.unflatten(-1, (2, -1))[..., self.rotary_pair]
            if shape.gauge == "applied":
                query = query.unflatten(1, (heads, -1))  # [b, j, n, 1, 2, P]
                query = complex_product(
                    query, self.key_gauge[:, None, None], conjugate=True
                ).flatten(1, 2)
            query = query.flatten(-2)
        if shape.contextual:
            output = self.decode_contextual(query, packed_key, packed_value, attention_mask)
        elif shape.latent_keys:  # the query heads of a group take the place of query positions
            output = nn.functional.scaled_dot_product_attention(
                query.reshape(len(query), heads, -1, self.head_dim),
                self.expand_keys(packed_key, key_table),
                packed_value.expand(-1, heads, -1, -1),
                attn_mask=attention_mask,
                scale=self.scaling,
            ).flatten(1, 2)[:, :, None]
        else:  # one shared head: the query heads take the place of query positions
            output = nn.functional.scaled_dot_product_attention(
                query.transpose(1, 2),
                packed_key,
                packed_value,
                attn_mask=attention_mask,
                scale=self.scaling,
            ).transpose(1, 2)
        if shape.gauge == "applied":
            output = output.unflatten(1, (heads, -1))
            output = torch.einsum("bjnsw,jdw->bjnsd", output, self.value_gauge).flatten(1, 2)
        elif shape.gauge == "none":
            output = output.unflatten(-1, (-1, self.head_dim)).sum(-2)
        return output

    def decode_contextual(
        self,
        query: torch.Tensor,
        packed_key: torch.Tensor,
        packed_value: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """`decode` in the component space, for cached head factors.

        Maps queries [b, h, 1, width_k] to outputs [b, h, 1, width_v].
        """
        shape = self.shape
        head_k, feature_k = self.unpack(packed_key, shape.rank_k, shape.width_k)
        head_v, feature_v = self.unpack(packed_value, shape.rank_v, shape.width_v)
        query = query[:, :, 0].unflatten(1, (self.num_key_value_heads, -1))
        query = query.unflatten(-1, (2, shape.rank_k, -1))
        feature_k = feature_k.unflatten(-1, (2, shape.rank_k, -1))
        scores = torch.einsum("bjncrp,btcrp->bjnrt", query, feature_k)
        scores = torch.einsum("bjnrt,btrj->bjnt", scores, head_k) * self.scaling
        if attention_mask is not None:
            mask = attention_mask[:, :, 0, None, :]
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        weights_r = torch.einsum("bjnt,btrj->bjnrt", weights, head_v)
        feature_v = feature_v.unflatten(-1, (shape.rank_v, -1))
        output = torch.einsum("bjnrt,btre->bjnre", weights_r, feature_v)
        return output.flatten(-2).flatten(1, 2).unsqueeze(2)


class TPADecoderLayer(LlamaDecoderLayer):
    """A Llama decoder layer with Tensor Product Attention."""

    def __init__(self, config: TPAConfig, layer_idx: int):
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = TPAAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class TPAPreTrainedModel(LlamaPreTrainedModel):
    config: TPAConfig
    config_class = TPAConfig
    _no_split_modules: ClassVar[list[str]] = ["TPADecoderLayer"]
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": TPADecoderLayer,
        "attentions": TPAAttention,
    }

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, TPAAttention):
            if module.shape.latent_keys:
                module.key_gauge.data.normal_(std=module.shape.width_k**-0.5)
                module.key_offset.data.zero_()
            else:
                pairs = module.rotary_pair
                pairs.copy_(torch.arange(len(pairs), device=pairs.device) % (module.head_dim // 2))
            if module.shape.gauge == "applied":
                if not module.shape.latent_keys:
                    module.key_gauge.data.normal_(std=1.0)
                module.value_gauge.data.normal_(std=module.shape.width_v**-0.5)

    def _get_static_cache_init_shape(self):
        # The cache is packed: its shapes follow from the first update, not from the config's heads.
        return None


class TPAModel(TPAPreTrainedModel, LlamaModel):
    """The decoder without its language-model head."""

    def __init__(self, config: TPAConfig):
        PreTrainedModel.__init__(self, config)  # not LlamaModel's, which builds Llama's layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [TPADecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        cache = given_cache(kwargs)
        if cache is not None and "latent" in self.config.key_cache:
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.embed_tokens(input_ids), None
            kwargs["cached_position_embeddings"] = self.rotary_emb(
                inputs_embeds,
                cached_positions(cache, inputs_embeds, position_ids, attention_mask),
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class TPAForCausalLM(TPAPreTrainedModel, LlamaForCausalLM):
    """A LLaMA-style causal language model with Tensor Product Attention."""

    def __init__(self, config: TPAConfig):
        PreTrainedModel.__init__(self, config)
        self.model = TPAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        # Where a text outgrows longrope's short factors, what is cached was made with the wrong
        # ones: it is computed again, as in Phi-3.
        rope = self.config.rope_parameters
        cache = given_cache(kwargs)
        if cache is not None and rope["rope_type"] == "longrope":
            limit = rope["original_max_position_embeddings"]
            if cache.get_seq_length() <= limit < input_ids.shape[1]:
                given_cache(kwargs, pop=True)
                if "next_sequence_length" in kwargs:
                    kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )


__all__ = ["TPAAttention", "TPAConfig", "TPAForCausalLM", "TPAModel", "TPAPreTrainedModel"]
