"""What engines that page their own cache need: components as the keys and values of one head.

An engine knows heads: so many, of one size, keys and values alike. Components of static rotated
keys are such a head that all queries share, once the queries are those of components and zeros
fill it up to a size that the engine's kernels take. Nothing here imports an engine.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tpa_convert.export.absorption import component_output, component_queries
from tpa_convert.modeling import AttentionNames, LayerShape, TPAAttention, norm_width, pair_table
from tpa_convert.modeling.tpa_codes import round_up
from tpa_convert.modeling.tpa_gauges import PairGauge
from tpa_convert.modeling.tpa_keys import RotatedKeys
from tpa_convert.modeling.tpa_prefill import eager_attention_forward
from tpa_convert.modeling.tpa_rotary import Table, feature_table, rotate

Named = tuple[str, Tensor]
GAUGE_OF = {
    "q_proj.weight": "keys.gauge.weight",
    "q_proj.bias": "keys.gauge.weight",
    "o_proj.weight": "values.gauge.weight",
}
"""The gauge that each projection of a layer absorbs."""


def obstacle(shape: LayerShape, kv_heads: int) -> str | None:
    """Why a layer is no single head, with what would make it one; None if it is.

    Args:
        kv_heads: of the source.
    """
    if shape.coded:
        return "it caches codes of bits; convert with --cache-bits 16"
    if shape.contextual:
        return "its head factors depend on the token; convert with --form static"
    if shape.latent_keys:
        return "its keys are latent; convert with --key-cache rotated"
    if shape.key_norm is True and kv_heads > 1:
        return f"its keys are normalised for each of {kv_heads} heads; serve it with transformers"
    return None


def head_size(shape: LayerShape, sizes: Sequence[int] | None, multiple: int = 8) -> int:
    """Size of the one head: the first that an engine has and that keys and values fit into.

    Args:
        sizes: that the engine has; None or nothing for all multiples of `multiple`.

    Raises:
        ValueError: none is large enough.
    """
    needed = max(shape.width_k, shape.width_v)
    if not sizes:
        return round_up(needed, multiple)
    found = min((size for size in sizes if size >= needed), default=None)
    if found is None:
        raise ValueError(f"{needed} numbers a token do not fit into heads of at most {max(sizes)}")
    return found


def absorbed(shape: LayerShape) -> LayerShape:
    """The shape whose gauges are inside the projections. Those of normalised keys stay: keys are
    rebuilt for the norm before they are cached."""
    key_gauge = shape.key_gauge if shape.key_norm else "absorbed"
    return replace(shape, key_gauge=key_gauge, value_gauge="absorbed")


def absorb_gauges(
    weights: Iterable[Named], config: Any, names: AttentionNames, head_dim: int, kv_heads: int
) -> Iterator[Named]:
    """The weights of a checkpoint as those of the shapes that `absorbed` gives, one by one.

    A projection waits for its gauge, since files have them in any order.

    Args:
        weights: names and tensors.
        config: of the checkpoint.
        names: of its family.
        head_dim, kv_heads: of the source.
    """
    pattern = re.compile(rf"(?:^|\.){names.layers}\.(\d+)\.{names.attention}\.(.+)$")
    gauges: dict[tuple[int, str], Tensor] = {}
    waiting: dict[tuple[int, str], list[tuple[str, str, Tensor]]] = defaultdict(list)
    merging = [_absorbed_gauges(shape) for shape in config.layer_shapes]

    def merged(layer: int, part: str, tensor: Tensor, gauge: Tensor) -> Tensor:
        shape = config.layer_shape(layer)
        exact, heads = tensor.double(), config.num_attention_heads
        if part == "o_proj.weight":
            return component_output(gauge.double(), exact, heads).flatten(1).to(tensor.dtype)
        keys = RotatedKeys(shape, 1, kv_heads, head_dim, bias=False, norm_eps=None)
        keys.gauge = PairGauge(kv_heads, shape.width_k // 2)
        keys.gauge.weight = nn.Parameter(gauge.double(), requires_grad=False)
        rows = exact if exact.ndim == 2 else exact[:, None]
        found = component_queries(keys, rows, heads).flatten(0, 1).to(tensor.dtype)
        return found if exact.ndim == 2 else found[:, 0]

    for name, tensor in weights:
        found = pattern.search(name)
        layer, part = (int(found[1]), found[2]) if found else (0, "")
        if found and part in merging[layer]:
            gauges[layer, part] = tensor
            for held, of, other in waiting.pop((layer, part), ()):
                yield held, merged(layer, of, other, tensor)
        elif found and GAUGE_OF.get(part) in merging[layer]:
            gauge = layer, GAUGE_OF[part]
            if gauge in gauges:
                yield name, merged(layer, part, tensor, gauges[gauge])
            else:
                waiting[gauge].append((name, part, tensor))
        else:
            yield name, tensor


def _absorbed_gauges(shape: LayerShape) -> set[str]:
    """Names of the gauges of a layer that `absorbed` has in the projections."""
    after = absorbed(shape)
    return {
        f"{part}.gauge.weight"
        for part, before, now in (
            ("keys", shape.key_gauge, after.key_gauge),
            ("values", shape.value_gauge, after.value_gauge),
        )
        if before == "applied" and now == "absorbed"
    }


class OneHeadAttention(nn.Module):
    """A layer of Tensor Product Attention that hands its components to an attention function as
    keys and values of one head; names and parameters are those of the layer.

    Args:
        layer: of which `obstacle` finds none.
        head_size: of the one head; what components leave free is zero.
    """

    def __init__(self, layer: TPAAttention, head_size: int):
        super().__init__()
        self.config, self.layer_idx = layer.config, layer.layer_idx
        self.num_heads, self.head_dim = layer.num_heads, layer.head_dim
        self.head_size, self.table_order = head_size, layer.table_order
        self.scaling, self.softcap = layer.scaling, layer.softcap
        self.sliding_window, self.is_causal = layer.sliding_window, layer.is_causal
        self.num_key_value_groups = layer.num_heads  # read by attention functions
        self.keys, self.values = cast(RotatedKeys, layer.keys), layer.values
        self.q_proj, self.q_norm, self.o_proj = layer.q_proj, layer.q_norm, layer.o_proj
        # An engine may make parameters elsewhere than buffers.
        self.keys.rotary_pair = self.keys.rotary_pair.to(torch.get_default_device())

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Table,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `TPAAttention`, without a cache of transformers.

        Args:
            hidden_states: [b, s, D].
            position_embeddings: cosines and sines of the tokens, [b, s, rotated dims].
        """
        pairs = pair_table(position_embeddings, self.head_dim // 2, self.table_order)
        query_table, key_table = self.keys.tables(feature_table(pairs))
        query = self.q_proj(hidden_states)
        if self.q_norm is not None:
            together = (-1, norm_width(self.q_norm))
            query = self.q_norm(query.unflatten(-1, together)).flatten(-2)
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query = self.keys.component_queries(rotate(query, query_table, self.keys.rotation))
        scale, key = self.keys.unpack(self.keys.pack(hidden_states, key_table))
        if scale is not None:  # the norm of a single head
            key = key * scale[:, :, 0].mT[..., None]
        value = self.values.pack(hidden_states)
        width = value.shape[-1]
        query, key, value = (self.padded(x) for x in (query, key, value))
        for name in ("sliding_window", "softcap"):
            if getattr(self, name) is not None:
                kwargs[name] = getattr(self, name)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self, query, key, value, attention_mask, scaling=self.scaling, **kwargs
        )
        # engines return [tokens, h head size], attention functions [b, s, h, head size]
        output = output.view(*hidden_states.shape[:-1], self.num_heads, self.head_size)
        mixed = self.values.output(output[..., :width].transpose(1, 2))
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), weights

    def padded(self, x: Tensor) -> Tensor:
        """With zeros behind it, up to the size of the one head."""
        return nn.functional.pad(x, (0, self.head_size - x.shape[-1]))


def use_one_head(
    model: nn.Module, size_of: Callable[[LayerShape], int] = lambda shape: head_size(shape, None)
) -> None:
    """Puts a `OneHeadAttention` in the place of every layer, in place.

    Args:
        size_of: size of the one head of a layer.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, TPAAttention):
                setattr(module, name, OneHeadAttention(child, size_of(child.shape)))
