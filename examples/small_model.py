"""A language model that is not in transformers, as somebody might have written it.

Its attention has names of its own, and rotates neighbouring features. It knows nothing of
tpa_convert: this file travels with what is converted.
"""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# transformers 5.24 gave the cache another name.
CACHE = next(n for n in ("cache", "past_key_values") if n in vars(BaseModelOutputWithPast()))


class SmallConfig(PreTrainedConfig):
    model_type = "small"

    vocab_size: int = 128
    hidden_size: int = 64
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 512
    rope_theta: float = 1000.0
    initializer_range: float = 0.2
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 0


class Rotary(nn.Module):
    """Cosines and sines [b, s, d]; the columns 2 p and 2 p + 1 belong to the pair p."""

    def __init__(self, config: SmallConfig):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_theta

    def forward(self, x, position_ids):
        pair = torch.arange(0, self.head_dim, 2, device=x.device) / self.head_dim
        angle = position_ids[..., None].float() * self.theta**-pair
        angle = angle.repeat_interleave(2, dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def turn(x, cos, sin):
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos[:, None] + turned * sin[:, None]


class SmallAttention(nn.Module):
    def __init__(self, config: SmallConfig, layer_idx: int):
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        narrow = self.head_dim * config.num_key_value_heads
        self.layer_idx = layer_idx
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, narrow, bias=False)
        self.value = nn.Linear(width, narrow, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = turn(query, *position_embeddings), turn(key, *position_embeddings)
        if kwargs.get(CACHE) is not None:
            key, value = kwargs[CACHE].update(key, value, self.layer_idx)
        mixed = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attention_mask,
            is_causal=attention_mask is None and query.shape[2] > 1,
            enable_gqa=True,
        )
        return self.out(mixed.transpose(1, 2).flatten(2)), None


class SmallBlock(nn.Module):
    def __init__(self, config: SmallConfig, layer_idx: int):
        super().__init__()
        self.first_norm = nn.RMSNorm(config.hidden_size)
        self.attn = SmallAttention(config, layer_idx)
        self.second_norm = nn.RMSNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, 2 * config.hidden_size),
            nn.GELU(),
            nn.Linear(2 * config.hidden_size, config.hidden_size),
        )

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attn(self.first_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.second_norm(hidden_states))


class SmallPreTrainedModel(PreTrainedModel):
    config_class = SmallConfig
    base_model_prefix = "model"
    _supports_sdpa = True


class SmallModel(SmallPreTrainedModel):
    def __init__(self, config: SmallConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rope = Rotary(config)
        self.blocks = nn.ModuleList(
            [SmallBlock(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        hidden_states, cache = self.embedding(input_ids), kwargs.get(CACHE)
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = past + torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        arguments = {
            "position_embeddings": self.rope(hidden_states, position_ids),
            "position_ids": position_ids,
            CACHE: cache,
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
            ),
        }
        for block in self.blocks:
            hidden_states = block(hidden_states, **arguments)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})


class SmallForCausalLM(SmallPreTrainedModel, GenerationMixin):
    def __init__(self, config: SmallConfig):
        super().__init__(config)
        self.model = SmallModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        output = self.model(input_ids, **kwargs)
        hidden_states = output.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden_states),
            **{CACHE: output.get(CACHE)},
        )
