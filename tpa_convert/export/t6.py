"""Import and export of attention weights in the layout of T6, the reference implementation of TPA.

The keys are those of the state dict of one T6 attention module (`transformer.h.{i}.attn`), so
that `module.load_state_dict(export_t6_attention(attention))` works. With D the hidden size, h query
heads and d the head dimension:

    c_qkv.W_A_q.weight                [h * R_Q, D]   head factors, view [h, R_Q]
    c_qkv.W_B_q.weight                [R_Q * d, D]   feature factors, view [R_Q, d]
    c_qkv.c_q.weight                  [h * d, D]     dense queries (TPA-KVonly) in place of the two
    c_qkv.W_A_k.weight, c_qkv.W_A_v.weight, c_qkv.W_B_k.weight, c_qkv.W_B_v.weight    alike
    c_proj.weight                     [D, h * d]     output projection

Both layouts compute Q, K, V = 1/R A(x)ᵀ B(x) (arXiv 2501.06425, eq. 3.1) without biases. They
differ in the order of rows and in RoPE: T6 rotates a pair by -θ where transformers rotates by +θ.
Scores only see the real part of q conj(k), so conjugating the pairs of queries and keys changes one
into the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from tpa_convert.errors import UserError
from tpa_convert.modeling import TPAAttention
from tpa_convert.sources.attention import rotated_dims

T6_ROPE_THETA = 10000.0
KEY_VALUE_NAMES = {f"c_qkv.W_{factor}_{name}.weight" for factor in "AB" for name in "kv"}
FACTORED_QUERY_NAMES = {"c_qkv.W_A_q.weight", "c_qkv.W_B_q.weight"}
DENSE_QUERY_NAMES = {"c_qkv.c_q.weight"}
OUTPUT_NAME = "c_proj.weight"


def import_t6_attention(
    weights: Mapping[str, Tensor], *, num_attention_heads: int, head_dim: int
) -> dict[str, Tensor]:
    """State dict of a `TPAAttention` that computes what T6's attention does with `weights`.

    It belongs to a layer of form `linear` and gauges `none` with `num_key_value_heads =
    num_attention_heads`, `rank_k`, `rank_v` (and `rank_q`) as the shapes say, no biases, the scale
    `head_dim ** -0.5` and plain RoPE of base 10000.

    Args:
        weights: as in the module's docstring, of any dtype. The output projection may be absent.
        num_attention_heads, head_dim: T6's `n_head` and `head_dim`.

    Returns: parameters; dtypes and devices as in `weights`.

    Raises:
        UserError: names or shapes are not those of a T6 attention module.
    """
    heads = num_attention_heads
    names = set(weights) - {OUTPUT_NAME}
    dense = names >= DENSE_QUERY_NAMES
    expected = KEY_VALUE_NAMES | (DENSE_QUERY_NAMES if dense else FACTORED_QUERY_NAMES)
    if names != expected:
        raise UserError(
            f"not the weights of a T6 attention layer (missing: {_listed(expected - names)}; "
            f"unknown: {_listed(names - expected)}): pass the state dict of `transformer.h.N.attn` "
            "of a T6 model without sub-layer norms"
        )
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"head_dim must be even (rotary pairs), not {head_dim}")
    _check_shapes(weights, heads, head_dim)

    def head_factor(name: str) -> Tensor:
        return _swap(weights[f"c_qkv.W_A_{name}.weight"], heads, -1)

    def feature_factor(name: str) -> Tensor:
        return weights[f"c_qkv.W_B_{name}.weight"]

    key = _conjugate(feature_factor("k"), head_dim)
    # Ours is one half-split vector over all components: [2, R, d / 2] instead of [R, 2, d / 2].
    key = key.unflatten(0, (-1, 2, head_dim // 2)).transpose(0, 1).flatten(0, 2)
    output = {
        "keys.head_factor.weight": head_factor("k"),
        "keys.feature_factor.weight": key,
        "values.head_factor.weight": head_factor("v"),
        "values.feature_factor.weight": feature_factor("v"),
    }
    if dense:
        output["q_proj.weight"] = _conjugate(weights["c_qkv.c_q.weight"], head_dim)
    else:
        output["q_proj.head_factor.weight"] = head_factor("q")
        output["q_proj.feature_factor.weight"] = _conjugate(feature_factor("q"), head_dim)
    if OUTPUT_NAME in weights:
        output["o_proj.weight"] = weights[OUTPUT_NAME]
    return output


@torch.no_grad()
def export_t6_attention(attention: TPAAttention) -> dict[str, Tensor]:
    """T6 weights of a layer of the paper's own form: `linear`, gauge `none`, no biases.

    T6 has a head factor for every query head, so a layer with fewer key/value heads repeats each of
    its own over the query heads of the group (and T6 caches `num_attention_heads /
    num_key_value_heads` times as many head factors). T6 scales scores by `head_dim ** -0.5`;
    another scale goes into the queries. T6's own class has one rank for keys and values; the layout
    itself does not need them to be equal.

    Returns: the state dict described in the module's docstring; dtypes and devices as in the layer.

    Raises:
        UserError: the layer computes something that T6 cannot.
    """
    config, shape = attention.config, attention.shape
    if reason := _obstacle(attention):
        raise UserError(f"layer {attention.layer_idx} has no T6 layout: {reason}")
    theta = config.rope_parameters["rope_theta"]
    if theta != T6_ROPE_THETA:
        warnings.warn(
            f"T6's Rotary has base {T6_ROPE_THETA:g} by default: construct it with base={theta:g}",
            UserWarning,
            stacklevel=2,
        )
    state = attention.state_dict()
    groups, head_dim = attention.num_key_value_heads, attention.head_dim
    rescale = attention.scaling * head_dim**0.5
    if attention.scaling == head_dim**-0.5:  # exactly 1, whatever the rounding
        rescale = 1.0

    def replicated(name: str, rank: int) -> Tensor:
        head = state[f"{name}.weight"].unflatten(0, (rank, groups))
        head = head.repeat_interleave(attention.num_heads // groups, dim=1)
        return _swap(head.flatten(0, 1), rank, -1)

    key = state["keys.feature_factor.weight"]
    key = key.unflatten(0, (2, shape.rank_k, head_dim // 2)).transpose(0, 1).flatten(0, 2)
    output = {
        "c_qkv.W_A_k.weight": replicated("keys.head_factor", shape.rank_k),
        "c_qkv.W_B_k.weight": _conjugate(key, head_dim),
        "c_qkv.W_A_v.weight": replicated("values.head_factor", shape.rank_v),
        "c_qkv.W_B_v.weight": state["values.feature_factor.weight"],
        OUTPUT_NAME: state["o_proj.weight"],
    }
    if shape.rank_q is None:
        output["c_qkv.c_q.weight"] = _conjugate(state["q_proj.weight"] * rescale, head_dim)
    else:
        head = state["q_proj.head_factor.weight"]
        feature = state["q_proj.feature_factor.weight"] * rescale
        output["c_qkv.W_A_q.weight"] = _swap(head, shape.rank_q, -1)
        output["c_qkv.W_B_q.weight"] = _conjugate(feature, head_dim)
    return output


def _obstacle(attention: TPAAttention) -> str | None:
    """What the layer does that T6 cannot, and what to do about it; None if there is nothing."""
    config, shape = attention.config, attention.shape
    if shape.form == "static":
        return "its head factors are constant, T6's depend on the token; convert with --form linear"
    if shape.form == "affine":
        return "affine head factors have a bias, T6 has none; convert with --form linear"
    if shape.key_norm:
        return "its keys are normalised (QK-norm), those of T6 are not"
    if "none" not in (shape.key_gauge, shape.value_gauge):
        return (
            f"T6 cannot hold its gauge ({shape.value_gauge}); convert with --form linear --method "
            "svd, which needs none"
        )
    if any(name.endswith("bias") for name in attention.state_dict()):
        return "its projections have biases, as those of its source, and T6 has none"
    if attention.sliding_window is not None or attention.softcap is not None:
        return "its source attends in a window or caps its scores, T6 does neither"
    turned = rotated_dims(config, attention.head_dim, attention.layer_idx)
    if attention.table_order is None or turned < attention.head_dim:
        return "its source rotates some of its features only, T6 rotates all"
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        return f"its RoPE is scaled ({rope_type}), T6 knows plain RoPE only"
    return None


def _swap(weight: Tensor, rows: int, columns: int) -> Tensor:
    """Reorder the rows of [rows * columns, D] from view [rows, columns] to view [columns, rows]."""
    return weight.unflatten(0, (rows, columns)).transpose(0, 1).flatten(0, 1)


def _conjugate(features: Tensor, head_dim: int) -> Tensor:
    """Negate the imaginary halves of half-split features [n * head_dim, D]."""
    real, imaginary = features.unflatten(0, (-1, 2, head_dim // 2)).unbind(1)
    return torch.stack((real, -imaginary), dim=1).flatten(0, 2)


def _check_shapes(weights: Mapping[str, Tensor], heads: int, head_dim: int) -> None:
    hidden_size = weights["c_qkv.W_B_k.weight"].shape[-1]
    for name, weight in weights.items():
        width = heads * head_dim
        if name == OUTPUT_NAME:
            expected = (hidden_size, width)
        elif name in DENSE_QUERY_NAMES:
            expected = (width, hidden_size)
        else:
            rank = max(1, len(weights[name.replace("W_A", "W_B")]) // head_dim)
            expected = (rank * (heads if "W_A" in name else head_dim), hidden_size)
        if tuple(weight.shape) != expected:
            raise UserError(
                f"{name} has shape {tuple(weight.shape)}, not {expected}: num_attention_heads="
                f"{heads} and head_dim={head_dim} must be n_head and head_dim of the T6 model"
            )


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
