"""What a plan costs beside its cache: parameters and arithmetic of the attention layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpa_convert.modeling import CLASSES, LayerShape
from tpa_convert.plans.plan import Plan


@dataclass(frozen=True)
class Cost:
    """Cost of all attention layers together; an FLOP is a multiplication or an addition.

    Attributes:
        cached_floats: numbers cached per token; of codes, the numbers that they stand for.
        parameters: weights of the attention layers, biases left out.
        decode_flops: for one more token after `context` cached ones.
        prefill_flops: for a prompt of `context` tokens.
    """

    cached_floats: int
    parameters: int
    decode_flops: int
    prefill_flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.cached_floats + other.cached_floats,
            self.parameters + other.parameters,
            self.decode_flops + other.decode_flops,
            self.prefill_flops + other.prefill_flops,
        )


def source_cost(sizes: Mapping[str, Any], context: int) -> Cost:
    """Cost of the attention layers of the source."""
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    width = sizes["head_dim"]
    layer = _cost(
        sizes["hidden_size"],
        cached=2 * groups * width,
        projected=2 * (heads + groups) * width,
        query_heads=heads,
        decode_widths=(width, width),
        prefill_widths=(width, width),
        gauge=0,
        context=context,
    )
    return _times(layer, sizes["num_hidden_layers"])


def plan_cost(plan: Plan, sizes: Mapping[str, Any], context: int) -> Cost:
    """Cost of the attention layers of a plan (with dense queries)."""
    total = Cost(0, 0, 0, 0)
    for shape in plan.layers:
        total += layer_cost(shape, sizes, context)
    return total


def layer_cost(
    shape: LayerShape, sizes: Mapping[str, Any], context: int, key_blocks: int | None = None
) -> Cost:
    """Cost of one layer; `key_blocks` of latent keys where the shape does not say them yet."""
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    head_dim = sizes["head_dim"]
    cached = shape.cached_floats(groups)
    norms = 0 if shape.contextual else shape.key_head_factors(groups)
    query = key = shape.width_k
    expanded_key, rebuilding, gauge = shape.width_k, 0, 0
    if shape.key_gauge != "absorbed":
        query = expanded_key = head_dim
    if shape.latent_keys:
        key = head_dim
        rebuilding = gauge = groups * head_dim * shape.width_k // (key_blocks or shape.key_blocks)
    elif shape.key_gauge == "applied":
        gauge = groups * shape.width_k
    mixed = output = shape.width_v
    if shape.coded:  # a token's class is one number more, and keys may say something of values
        known = shape.width_k + CLASSES - 1 if shape.predict_values else 0
        mixed += CLASSES - 1 + known
        gauge += groups * head_dim * (CLASSES - 1) + known * shape.width_v
    if shape.value_gauge != "absorbed":
        output = head_dim
    if shape.value_gauge == "applied":
        gauge += groups * head_dim * mixed
    return _cost(
        sizes["hidden_size"],
        cached=cached,
        projected=heads * (query + output) + cached - norms,
        query_heads=heads,
        decode_widths=(key, mixed),
        prefill_widths=(expanded_key, output),
        gauge=gauge,
        rebuilding=rebuilding,
        context=context,
    )


def _cost(
    hidden_size: int,
    *,
    cached: int,
    projected: int,
    query_heads: int,
    decode_widths: tuple[int, int],
    prefill_widths: tuple[int, int],
    gauge: int,
    context: int,
    rebuilding: int = 0,
) -> Cost:
    """Cost of one layer.

    Args:
        projected: outputs of the query, factor and output projections, each times `hidden_size`.
        decode_widths, prefill_widths: numbers per key and per value that a query head reads.
        gauge: parameters of a gauge that is applied at run time.
        rebuilding: of them, those that every decoding step applies to every cached token.
    """
    parameters = hidden_size * projected + gauge
    scores = 2 * query_heads * context
    return Cost(
        cached_floats=cached,
        parameters=parameters,
        decode_flops=2 * (parameters + rebuilding * context) + scores * sum(decode_widths),
        # causal: half of all pairs of positions
        prefill_flops=2 * parameters * context + scores * sum(prefill_widths) * context // 2,
    )


def _times(cost: Cost, count: int) -> Cost:
    return Cost(*(value * count for value in vars(cost).values()))


def rebuilding_per_byte(plan: Plan) -> float:
    """Additions and multiplications that rebuild latent keys at every step, for each byte that the
    source caches; 0 without them."""
    head_width = plan.num_key_value_heads * plan.head_dim
    rebuilt = sum(
        2 * head_width * shape.width_k / (plan.coded.key_blocks if plan.coded else shape.key_blocks)
        for shape in plan.layers
        if shape.latent_keys
    )
    return rebuilt / plan.source_kv_bytes


def largest_context(memory: float, weight_bytes: float, kv_bytes: float, batch: int) -> int:
    """Tokens a sequence that fit beside the weights; 0 if not even those do.

    Args:
        memory: bytes in all. Activations are not counted.
        kv_bytes: cached per token by the whole model.
        batch: sequences at once.
    """
    return max(0, int((memory - weight_bytes) / (kv_bytes * batch)))
