"""A source, its moments and a plan in; a TPA model out."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tpa_convert.calibration.moments import Moments
from tpa_convert.decomposition import (
    METHODS,
    AttentionWeights,
    KeyFactors,
    LatentKeyFactors,
    LayerMoments,
    ValueFactors,
    data_free_moments,
    decompose_latent_keys,
)
from tpa_convert.decomposition.factors import to_complex_pairs, to_half_split, with_unit_gauge
from tpa_convert.decomposition.gauge import value_metric
from tpa_convert.decomposition.tensor import head_svd
from tpa_convert.errors import UserError
from tpa_convert.modeling import LayerShape, TPAConfig, TPAForCausalLM
from tpa_convert.plans import Plan
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source
from tpa_convert.sources.attention import attention_weights


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


def attention_parameters(
    weights: AttentionWeights,
    keys: KeyFactors | LatentKeyFactors,
    values: ValueFactors,
    shape: LayerShape,
    functional: Tensor,
    rank_q: int | None = None,
) -> dict[str, Tensor]:
    """State dict of one `TPAAttention` (biases included, whether or not the source has them).

    Args:
        weights: the source layer.
        keys, values: its factors.
        shape: how the layer is laid out.
        functional: [D], stands in for the constant 1 in `linear` head factors.
        rank_q: rank of factored queries, None for dense ones.
    """
    absorbed = shape.gauge == "absorbed"
    query, output = weights.query, {}
    if isinstance(keys, LatentKeyFactors):
        key_feature = keys.feature
        output["key_gauge"], output["key_offset"] = keys.gauge, keys.offset
    else:
        key_feature = to_half_split(keys.feature, 0)
        output["rotary_pair"] = keys.rotary_pair
        if absorbed:
            query = absorbed_query(weights, keys)
        elif shape.gauge == "applied":
            output["key_gauge"] = torch.stack((keys.gauge.real, keys.gauge.imag), dim=1)
    projection = absorbed_output(weights, values) if absorbed else weights.output
    if rank_q is None:
        queries = [("q_proj", query.flatten(0, 1))]
    else:
        second_moment = query.flatten(0, 1) @ query.flatten(0, 1).mT  # of white inputs
        head_factor, feature = head_svd(query, second_moment, rank_q)
        queries = [("q_proj.feature_factor", feature.flatten(0, 1))]
        name = "q_proj.head_factor"
        output |= head_factor_parameters(name, head_factor, functional, shape.form)
    for name, weight in (
        *queries,
        ("k_feature_factor", key_feature),
        ("v_feature_factor", values.feature),
    ):
        output[f"{name}.weight"], output[f"{name}.bias"] = weight[:, :-1], weight[:, -1]
    output["o_proj.weight"] = projection.flatten(1)
    if weights.output_bias is not None:
        output["o_proj.bias"] = weights.output_bias
    if shape.gauge == "applied":
        output["value_gauge"] = values.gauge
    if shape.contextual:
        assert isinstance(keys, KeyFactors)
        for name, rank, factors in (("k", shape.rank_k, keys), ("v", shape.rank_v, values)):
            # with a gauge, the constant head factors are inside it
            head = functional.new_ones(rank, len(weights.key))
            if shape.gauge == "none":
                assert factors.head_factor is not None
                head = factors.head_factor
            output |= head_factor_parameters(f"{name}_head_factor", head, functional, shape.form)
    return output


def convert_layer(
    weights: AttentionWeights,
    moments: LayerMoments | None,
    shape: LayerShape,
    *,
    method: str,
    whiten: bool,
    rank_limit_k: int | None = None,
    rank_q: int | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Parameters of one converted attention layer, and its rank_k (`static`: the most components on
    one rotary pair)."""
    decompose = METHODS[method]
    metric = value_metric(weights)
    basis = moments
    if basis is None or not whiten:
        basis = data_free_moments(weights)
        metric = torch.eye(metric.shape[-1], dtype=metric.dtype).expand_as(metric)
    functional = (moments or basis).constant_functional
    values = with_unit_gauge(decompose.decompose_values(weights, basis, shape.width_v, metric))
    if shape.latent_keys:
        latent = with_unit_gauge(decompose_latent_keys(weights, basis, shape.width_k))
        return attention_parameters(weights, latent, values, shape, functional), shape.rank_k
    keys = with_unit_gauge(decompose.decompose_keys(weights, basis, shape.width_k, rank_limit_k))
    rank = shape.rank_k if shape.contextual else int(keys.rotary_pair.bincount().max())
    return attention_parameters(weights, keys, values, shape, functional, rank_q), rank


@torch.no_grad()
def convert_model(
    source: Source,
    plan: Plan,
    moments: Moments | None,
    *,
    method: str = "gauge",
    whiten: bool = True,
    dtype: torch.dtype | None = None,
    track: Track = no_tracking,
) -> TPAForCausalLM:
    """Converts every attention layer of `source`; everything else is copied.

    Args:
        source: the pretrained model.
        plan: shapes of the layers.
        moments: of the source on calibration text. Not needed without whitening, except by the
            `linear` form, whose head factors need to know the inputs.
        method: a key of `METHODS`.
        whiten: decompose what attention does (True) or the weights alone.
        dtype: of the result; the source's if None.
        track: shows progress over the layers.

    Returns: the converted model on the CPU, in eval mode.

    Raises:
        UserError: moments missing or of another source, or tensors of the source have no place in a
            Llama.
    """
    linear = any(layer.form == "linear" for layer in plan.layers)
    if moments is None and (whiten or linear):
        raise UserError(f"the {'linear form' if linear else method} needs calibration moments")
    if moments is not None and moments.source_sha256 != source.reference.sha256:
        raise UserError(
            "the moments file was made from another source: calibrate again with --save-moments"
        )
    llama_config = source.architecture.llama_config(source.model.config)
    config = TPAConfig(
        **llama_config,
        **plan.config_fields(),
        attention_scale=source.architecture.attention_scale(source.model.config),
    )
    dtype = dtype or source.model.dtype
    state = {
        name: tensor.cpu()
        for name, tensor in source.architecture.llama_state_dict(source.model).items()
    }
    with torch.device("meta"):
        model = TPAForCausalLM(config)
    expected = model.state_dict().keys()
    _refuse_unread(state, config, expected)
    parameters = {
        name: tensor.to(dtype, copy=True)
        for name, tensor in state.items()
        if "self_attn" not in name
    }
    rank_k = []
    for i, shape in enumerate(track(plan.layers, "converting")):
        weights = attention_weights(source, state, i)
        layer, rank = convert_layer(
            weights,
            moments.layers[i] if moments else None,
            shape,
            method=method,
            whiten=whiten,
            rank_limit_k=plan.rank_limit_k,
            rank_q=plan.rank_q,
        )
        rank_k.append(rank)
        for name, tensor in layer.items():
            key = f"model.layers.{i}.self_attn.{name}"
            parameters[key] = (
                tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor
            )
    config.rank_k = rank_k
    model.load_state_dict({k: v for k, v in parameters.items() if k in expected}, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.tie_weights()
    if source.model.generation_config is not None:
        model.generation_config = source.model.generation_config
    return model.eval()


def _refuse_unread(names: Iterable[str], config: TPAConfig, expected: Collection[str]) -> None:
    """Refuses tensors that the conversion would leave out: the model would not stay itself.

    Args:
        names: of the source's tensors, Llama's.
        expected: names of the converted model's.
    """
    attention = {f"{name}_proj.weight" for name in "qkvo"}
    attention |= {f"{name}_proj.bias" for name in "qkv" if config.attention_bias}
    attention |= {"o_proj.bias"} if config.attention_output_bias else set()
    unread = [
        name
        for name in names
        if name.rpartition(".self_attn.")[2] not in attention
        and name not in expected
        and not name.endswith("inv_freq")
    ]
    if unread:
        raise UserError(
            f"{len(unread)} tensors of the source have no place in a Llama (the first: "
            f"{unread[0]}): register an architecture that describes it"
        )
