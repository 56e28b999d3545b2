"""One attention layer: weights and moments in, parameters of a `TPAAttention` out."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tpa_convert.coding import CacheMoments
from tpa_convert.conversion.coded import coded_parameters
from tpa_convert.decomposition import (
    METHODS,
    AttentionWeights,
    DataFreeMoments,
    KeyFactors,
    LatentKeyFactors,
    LayerMoments,
    ValueFactors,
    decompose_latent_keys,
)
from tpa_convert.decomposition.factors import to_complex_pairs, to_half_split, with_unit_gauge
from tpa_convert.decomposition.gauge import value_metric
from tpa_convert.decomposition.tensor import head_svd
from tpa_convert.modeling import AttentionNames, LayerShape, TPAAttention
from tpa_convert.sources.attention import query_norm_parameters


def absorbed_query(weights: AttentionWeights, factors: KeyFactors) -> Tensor:
    """Queries in the component space, q_{i,p} = conj(T_{j(i),p}) q_{i,pair(p)}: [h, 2 p, D + 1]."""
    pairs = to_complex_pairs(weights.query, 1)[:, factors.rotary_pair]
    gauge = factors.gauge.repeat_interleave(weights.heads_per_group, dim=0)
    return to_half_split(gauge.conj()[..., None] * pairs, 1)


def absorbed_output(weights: AttentionWeights, factors: ValueFactors) -> Tensor:
    """Output projection of the value components, O_i U_{j(i)}: [D, h, w]."""
    gauge = factors.gauge.repeat_interleave(weights.heads_per_group, dim=0)
    return torch.einsum("xhd,hdw->xhw", weights.output, gauge)


def head_factor_parameters(
    name: str, head_factor: Tensor, functional: Tensor, form: str
) -> dict[str, Tensor]:
    """Weights of a(x) that reproduce the constant head factors α, [R, g], as well as the form can.

    `affine`: a = α + 0·x, exact. `linear`: a = R α (w·x), with w the functional closest to 1; R
    undoes the form's 1 / R.
    """
    if form == "affine":
        weight = head_factor.new_zeros(head_factor.numel(), len(functional))
        return {f"{name}.weight": weight, f"{name}.bias": head_factor.flatten()}
    return {f"{name}.weight": len(head_factor) * head_factor.flatten().outer(functional)}


def by_rotary_pair(keys: KeyFactors) -> KeyFactors:
    """The same factors with their components in the order of the rotary pairs, as a layer counts
    them."""
    order = keys.rotary_pair.argsort(stable=True)
    return KeyFactors(
        keys.feature[order], keys.gauge[:, order], keys.rotary_pair[order], keys.head_factor
    )


def attention_parameters(
    weights: AttentionWeights,
    keys: KeyFactors | LatentKeyFactors,
    values: ValueFactors,
    shape: LayerShape,
    functional: Tensor,
) -> dict[str, Tensor]:
    """State dict of one `TPAAttention` (biases included, whether or not the source has them; the
    norm of the queries, which is the source's own module, left out).

    Args:
        weights: the source layer.
        keys, values: its factors.
        shape: how the layer is laid out.
        functional: [D], stands in for the constant 1 in `linear` head factors.
    """
    query, output = weights.query, {}
    if isinstance(keys, LatentKeyFactors):
        key_feature = keys.feature
        output["keys.gauge.weight"], output["keys.gauge.offset"] = keys.gauge, keys.offset
    else:
        key_feature = to_half_split(keys.feature, 0)
        if shape.key_gauge == "absorbed":
            query = absorbed_query(weights, keys)
        elif shape.key_gauge == "applied":
            output["keys.gauge.weight"] = torch.stack((keys.gauge.real, keys.gauge.imag), dim=1)
    if weights.key_norm is not None:
        output["keys.norm.weight"] = weights.key_norm.weight
    projection = weights.output
    if shape.value_gauge == "absorbed":
        projection = absorbed_output(weights, values)
    elif shape.value_gauge == "applied":
        output["values.gauge.weight"] = values.gauge
    if shape.rank_q is None:
        queries = [("q_proj", query.flatten(0, 1))]
    else:
        second_moment = query.flatten(0, 1) @ query.flatten(0, 1).mT  # of white inputs
        head_factor, feature = head_svd(query, second_moment, shape.rank_q)
        queries = [("q_proj.feature_factor", feature.flatten(0, 1))]
        name = "q_proj.head_factor"
        output |= head_factor_parameters(name, head_factor, functional, shape.form)
    for name, weight in (
        *queries,
        ("keys.feature_factor", key_feature),
        ("values.feature_factor", values.feature),
    ):
        output[f"{name}.weight"], output[f"{name}.bias"] = weight[:, :-1], weight[:, -1]
    output["o_proj.weight"] = projection.flatten(1)
    if weights.output_bias is not None:
        output["o_proj.bias"] = weights.output_bias
    if shape.contextual:
        assert isinstance(keys, KeyFactors)
        for name, rank, gauge, factors in (
            ("keys", shape.rank_k, shape.key_gauge, keys),
            ("values", shape.rank_v, shape.value_gauge, values),
        ):
            # with a gauge, the constant head factors are inside it
            head = functional.new_ones(rank, len(weights.key))
            if gauge == "none":
                assert factors.head_factor is not None
                head = factors.head_factor
            output |= head_factor_parameters(f"{name}.head_factor", head, functional, shape.form)
    return output


def coded_attention_parameters(
    weights: AttentionWeights, moments: CacheMoments, tokens: int, shape: LayerShape
) -> dict[str, Tensor]:
    """As `attention_parameters`, of a layer whose cache is coded; its queries and its output
    projection are the source's own.

    Args:
        moments: of the layer, of this many `tokens`.
    """
    query = weights.query.flatten(0, 1)
    output = {
        "q_proj.weight": query[:, :-1],
        "q_proj.bias": query[:, -1],
        "o_proj.weight": weights.output.flatten(1),
    }
    if weights.output_bias is not None:
        output["o_proj.bias"] = weights.output_bias
    if weights.key_norm is not None:
        output["keys.norm.weight"] = weights.key_norm.weight
    return output | coded_parameters(weights, moments, tokens, shape)


def convert_layer(
    weights: AttentionWeights,
    moments: LayerMoments | None,
    shape: LayerShape,
    *,
    method: str,
    whiten: bool,
    rank_limit_k: int | None = None,
) -> tuple[dict[str, Tensor], LayerShape]:
    """Parameters of one converted attention layer, and its shape with what the factors decided:
    the rotary pairs of the key components, and of `static` layers the most on one pair."""
    decompose = METHODS[method]
    if moments is None or not whiten:
        basis: LayerMoments = DataFreeMoments(weights)
        groups, head_dim, _ = weights.value.shape
        metric = torch.eye(head_dim).to(weights.value).expand(groups, -1, -1)
    else:
        basis, metric = moments, value_metric(weights)
    functional = (moments or basis).constant_functional
    values = with_unit_gauge(decompose.decompose_values(weights, basis, shape.width_v, metric))
    if shape.latent_keys:
        latent = with_unit_gauge(decompose_latent_keys(weights, basis, shape.width_k))
        return attention_parameters(weights, latent, values, shape, functional), shape
    limit: int | Tensor | None = rank_limit_k
    if shape.key_pairs is not None:  # the plan says how many components each pair gets
        limit = torch.tensor([int(count) for count in shape.key_pairs.split()])
    keys = with_unit_gauge(decompose.decompose_keys(weights, basis, shape.width_k, limit))
    if shape.key_gauge != "none":
        keys = by_rotary_pair(keys)
        counts = keys.rotary_pair.bincount(minlength=weights.key.shape[1] // 2)
        shape = replace(shape, key_pairs=" ".join(map(str, counts.tolist())))
        if not shape.contextual:
            shape = replace(shape, rank_k=int(counts.max()))
    return attention_parameters(weights, keys, values, shape, functional), shape


def attention_module(
    source: nn.Module,
    names: AttentionNames,
    config: Any,
    layer_idx: int,
    parameters: dict[str, Tensor],
) -> TPAAttention:
    """The converted attention of one layer by itself, in fp32 and eval mode; it shares nothing with
    the source.

    Args:
        source: the attention that it takes the place of.
        config: of the converted model.
        parameters: as `convert_layer` gives them.
    """
    with torch.device("meta"):
        attention = TPAAttention(config, layer_idx, source, names)
    attention.q_norm = copy.deepcopy(attention.q_norm)  # the source's own module
    state = parameters | query_norm_parameters(source, names, config, layer_idx)
    expected = attention.state_dict().keys()
    state = {name: state[name].to(torch.float32, copy=True) for name in expected}
    attention.load_state_dict(state, assign=True)
    return attention.eval().requires_grad_(True)
