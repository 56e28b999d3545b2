"""Changes to the closed form that the ablation tries, each a function.

Letters as in `tpa_convert.decomposition.factors`.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.layer_statistics import Statistics, layer_weights, of_inputs
from tpa_convert.calibration.moments import MomentAccumulator, Moments
from tpa_convert.conversion.layer import attention_module, convert_layer
from tpa_convert.conversion.model import convert_model
from tpa_convert.decomposition import AttentionWeights, KeyFactors, ValueFactors
from tpa_convert.decomposition.factors import to_complex_pairs, to_half_split
from tpa_convert.decomposition.gauge import (
    allocate_components,
    by_head,
    decompose_keys,
    decompose_values,
    key_components,
    score_weights,
    value_components,
    value_metric,
)
from tpa_convert.forward.walk import DecoderWalk
from tpa_convert.modeling import LayerShape, pair_table
from tpa_convert.plans import Plan
from tpa_convert.sources import Source
from tpa_convert.sources.attention import attention_weights


def reconstructed(
    weights: AttentionWeights, keys: KeyFactors, values: ValueFactors
) -> AttentionWeights:
    """The source's own weights for narrowed keys and values: T commutes with rotations."""
    pairs = torch.zeros_like(to_complex_pairs(weights.key, 1))
    parts = keys.gauge[..., None] * keys.feature
    pairs.index_add_(1, keys.rotary_pair, parts)
    return replace(weights, key=to_half_split(pairs, 1), value=values.gauge @ values.feature)


def closed_form(
    weights: AttentionWeights, statistics: Statistics, width_k: int, width_v: int
) -> AttentionWeights:
    """The package's gauge decomposition."""
    keys = decompose_keys(weights, statistics, width_k)
    values = decompose_values(weights, statistics, width_v, value_metric(weights))
    return reconstructed(weights, keys, values)


def tokens_alike(
    weights: AttentionWeights, statistics: Statistics, width_k: int, width_v: int
) -> AttentionWeights:
    """Without attention weighting (and so without centring)."""
    plain = of_inputs(weights, statistics, statistics.input_equal)
    return closed_form(weights, plain, width_k, width_v)


def uncentred_keys(
    weights: AttentionWeights, statistics: Statistics, width_k: int, width_v: int
) -> AttentionWeights:
    """Keys weighted by attention, but not centred under it."""
    uncentred = of_inputs(weights, statistics, statistics.input_weighted)
    uncentred = replace(uncentred, value_covariance=statistics.value_covariance)
    return closed_form(weights, uncentred, width_k, width_v)


def value_constant(
    weights: AttentionWeights, statistics: Statistics, width_k: int, width_v: int
) -> AttentionWeights:
    """The mean of the attention-mixed values costs no cache: what is cut of it goes to a bias."""
    mean = statistics.value_mean
    centred = replace(statistics, value_covariance=statistics.value_covariance - mean.outer(mean))
    result = closed_form(weights, centred, width_k, width_v)
    _, vectors, root, inverse = value_components(centred, value_metric(weights))
    kept = vectors[:, -width_v:]
    inside = kept @ (kept.mT @ by_head(root, mean[:, None]))
    lost = mean - by_head(inverse, inside)[:, 0]
    heads = lost.view(weights.value.shape[:2]).repeat_interleave(weights.heads_per_group, 0)
    return replace(result, output_bias=torch.einsum("xhd,hd->x", weights.output, heads))


def attention_per_head(
    weights: AttentionWeights,
    statistics: Statistics,
    width_k: int,
    width_v: int,
    rounds: int = 30,
) -> AttentionWeights:
    """Keys weighted by each query head's own attention, by alternating least squares.

    Minimises Σ_j tr(e_j A_j e_jᴴ) for the rows e_j = δ_j − T_j B of every pair, with
    A_j = Σ_{i∈j} E|q_i|² S_i; it starts from the closed form for the mean attention.
    """
    groups = len(weights.key)
    energy_hf = statistics.head_query_energy
    per_head = energy_hf[..., None, None] * statistics.head_pair_covariance
    a_fj = per_head.unflatten(0, (groups, -1)).sum(1).transpose(0, 1)  # [f, j, g, g]
    pairs = to_complex_pairs(weights.key, 1)
    weight = score_weights(statistics.query_energy)
    eigenvalues, vectors = key_components(statistics)
    rotary_pair, component = allocate_components(eigenvalues, width_k // 2, None)
    result = torch.zeros_like(pairs)
    index = torch.arange(groups)
    for f in rotary_pair.unique().tolist():
        a_j = a_fj[f]
        own_j = a_j[index, index]  # δ_j A_j, [j, g]
        basis = vectors[f][:, component[rotary_pair == f]].mH * weight[:, f]  # B, [n, g]
        ridge = 1e-9 * a_j.diagonal(dim1=-2, dim2=-1).real.mean()
        ridge = ridge * torch.eye(len(basis), dtype=pairs.dtype)
        for _ in range(rounds):
            gram_j = basis @ a_j @ basis.mH + ridge
            t_jn = torch.linalg.solve(gram_j.mT, (own_j @ basis.mH)[..., None])[..., 0]
            # normal equations of B: Σ_j T_jᴴ T_j B A_j = Σ_j T_jᴴ δ_j A_j
            left = torch.einsum("jn,jm,jgh->nhmg", t_jn.conj(), t_jn, a_j)
            right = torch.einsum("jn,jh->nh", t_jn.conj(), own_j)
            left = left.flatten(2).flatten(0, 1)
            basis = (torch.linalg.pinv(left, rtol=1e-9) @ right.flatten()).view(basis.shape)
        result[:, f] = t_jn @ (basis @ pairs[:, f])
    values = decompose_values(weights, statistics, width_v, value_metric(weights))
    keys = decompose_keys(weights, statistics, width_k)
    rebuilt = reconstructed(weights, keys, values)
    return replace(rebuilt, key=to_half_split(result, 1))


def queries_refitted(source: Source, plan: Plan, moments: Moments) -> PreTrainedModel:
    """W_Q by least squares: a gauge for every query head, fitted to that head's own attention.

    With the components b = B k of the closed form on a pair, T_i = S_i[j, :] Bᴴ (B S_i Bᴴ)⁻¹. Free
    where the queries absorb the gauge, as `plan` must say.
    """
    model = convert_model(source, plan, moments)
    for layer, weights, statistics, shape in zip(
        model.model.layers, layer_weights(source), moments.layers, plan.layers, strict=True
    ):
        weight_fg = score_weights(statistics.query_energy).mT
        eigenvalues, vectors = key_components(statistics)
        rotary_pair, component = allocate_components(eigenvalues, shape.width_k // 2, None)
        weight_pg, vector_pg = weight_fg[rotary_pair], vectors[rotary_pair, :, component]
        # The model's features hold the norm that its gauge had in closed form.
        norm_p = torch.linalg.vector_norm(vector_pg / weight_pg, dim=1)
        basis_pg = norm_p[:, None] * vector_pg.conj() * weight_pg
        own = torch.arange(len(weights.query)) // weights.heads_per_group
        gauge_hp = basis_pg.new_zeros(len(weights.query), len(basis_pg))
        for f in rotary_pair.unique().tolist():
            chosen = rotary_pair == f
            basis, s_h = basis_pg[chosen], statistics.head_pair_covariance[:, f]
            gram_h = basis @ s_h @ basis.mH
            ridge = 1e-4 * gram_h.diagonal(dim1=-2, dim2=-1).real.mean(-1)
            gram_h = gram_h + ridge[:, None, None] * torch.eye(len(basis), dtype=basis.dtype)
            own_h = s_h[torch.arange(len(own)), own]
            cross_h = (own_h[:, None] @ basis.mH)[:, 0]
            gauge_hp[:, chosen] = torch.linalg.solve(gram_h.mT, cross_h[..., None])[..., 0]
        pairs = to_complex_pairs(weights.query, 1)[:, rotary_pair]
        query = to_half_split(gauge_hp.conj()[..., None] * pairs, 1).flatten(0, 1)
        layer.self_attn.q_proj.weight.data = query[:, :-1].to(layer.self_attn.q_proj.weight)
    return model


def shared_features(
    weights: AttentionWeights, statistics: Statistics, width_k: int, width_v: int
) -> AttentionWeights:
    """One feature factor for both: keys of the whole budget, and values read from their features
    (before rotation, so a decoder would have to rotate them back)."""
    keys = decompose_keys(weights, statistics, min(width_k + width_v, weights.key[:, :, 0].numel()))
    feature = to_half_split(keys.feature, 0)
    moment = statistics.input_weighted
    value = weights.value.flatten(0, 1)
    gram = feature @ moment @ feature.mT
    gram = gram + 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    gauge = torch.linalg.solve(gram, feature @ moment @ value.mT).mT
    values = ValueFactors(feature, gauge.view(*weights.value.shape[:2], -1))
    return reconstructed(weights, keys, values)


# ------------------------------------------------------------------------------- folding


def folded_groups(inverse_frequencies: Tensor, tolerance: float) -> list[list[int]]:
    """Neighbouring rotary pairs whose frequencies differ by at most `tolerance` radians a token."""
    groups: list[list[int]] = []
    for f, frequency in reversed(list(enumerate(inverse_frequencies.tolist()))):
        if groups and frequency - inverse_frequencies[groups[-1][0]] <= tolerance:
            groups[-1].append(f)
        else:
            groups.append([f])
    return groups


def folded_model(
    source: Source, plan: Plan, moments: Moments, context: int, phase: float = 0.5
) -> PreTrainedModel:
    """Slow neighbouring pairs rotate as one, so that components may span them.

    Approximate: at a distance of `context` tokens their phases are wrong by up to `phase` radians.
    The gauge is absorbed; a component keeps the frequency of the pair where it is strongest.
    """
    model = convert_model(source, plan, moments)
    frequencies = source.model.model.rotary_emb.inv_freq.double().cpu()
    groups = folded_groups(frequencies, phase / context)
    for i, weights in enumerate(layer_weights(source)):
        shape, layer = plan.layers[i], model.model.layers[i]
        feature, gauge, rotary_pair = folded_keys(weights, moments.layers[i], groups, shape.width_k)
        by_head = gauge.repeat_interleave(weights.heads_per_group, dim=1)
        query = torch.einsum("phf,hfx->hpx", by_head.conj(), to_complex_pairs(weights.query, 1))
        parameters = dict(layer.self_attn.state_dict())
        parameters["q_proj.weight"] = to_half_split(query, 1).flatten(0, 1)[:, :-1]
        parameters["keys.feature_factor.weight"] = to_half_split(feature, 0)[:, :-1]
        counts = rotary_pair.bincount(minlength=weights.key.shape[1] // 2)
        pairs = " ".join(map(str, counts.tolist()))
        put_layer(
            model, source, i, parameters, replace(model.config.layer_shape(i), key_pairs=pairs)
        )
    return model


def put_layer(
    model: PreTrainedModel,
    source: Source,
    index: int,
    parameters: dict[str, Tensor],
    shape: LayerShape,
) -> None:
    """Gives layer `index` of a converted model another attention, whose rotary pairs may differ."""
    names, layer = source.family.names, model.get_decoder().layers[index]
    model.config.tpa_layers[index] = asdict(shape)
    original = getattr(source.model.get_decoder().layers[index], names.attention)
    attention = attention_module(original, names, model.config, index, parameters)
    attention.rotary_emb = getattr(layer, names.attention).rotary_emb
    setattr(layer, names.attention, attention.to(model.device))


def folded_keys(
    weights: AttentionWeights, moments, groups: list[list[int]], width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Feature [p, D + 1], gauge T [p, g, f] and rotary pair [p], ascending, of the strongest
    components."""
    heads, head_dim, _ = weights.key.shape
    pairs = head_dim // 2
    blocks = moments.key_covariance.view(heads, 2, pairs, heads, 2, pairs)
    covariance = torch.complex(
        blocks[:, 0, :, :, 0] + blocks[:, 1, :, :, 1],
        blocks[:, 1, :, :, 0] - blocks[:, 0, :, :, 1],
    )  # [g, f, g, f], before rotation: the same where a group rotates slowly
    weight = score_weights(moments.query_energy)
    single, vectors = key_components(moments)
    key = to_complex_pairs(weights.key, 1)
    found = []
    for group in groups:
        size = len(group)
        if size == 1:
            values, basis = single[group[0]], vectors[group[0]]
        else:
            part = covariance[:, group][:, :, :, group]
            w = weight[:, group]
            part = part * w[:, :, None, None] * w[None, None]
            values, basis = torch.linalg.eigh(part.reshape(heads * size, heads * size))
        for value, u in zip(values.tolist(), basis.mT, strict=True):
            u = u.view(heads, size)
            gauge = torch.zeros(heads, pairs, dtype=key.dtype)
            gauge[:, group] = u / weight[:, group]
            feature = torch.einsum("gm,gmx->x", u.conj() * weight[:, group], key[:, group])
            strongest = group[int(u.abs().square().sum(0).argmax())]
            found.append((value, feature, gauge, strongest))
    found = sorted(sorted(found, key=lambda c: -c[0])[: width // 2], key=lambda c: c[3])
    return (
        torch.stack([c[1] for c in found]),
        torch.stack([c[2] for c in found]),
        torch.tensor([c[3] for c in found]),
    )


# ------------------------------------------------------------------------------- sequential


@torch.no_grad()
def sequential_model(
    source: Source,
    plan: Plan,
    moments: Moments,
    blocks: Tensor,
    batch_size: int = 8,
) -> PreTrainedModel:
    """Layers converted in order, each with moments from the converted model's own stream."""
    model = convert_model(source, plan, moments).to(source.model.device)
    names, config = source.family.names, source.model.config
    walk = DecoderWalk(model, blocks, batch_size, names.attention)
    for i, weights in enumerate(layer_weights(source)):
        original = getattr(source.model.get_decoder().layers[i], names.attention)
        single = attention_weights(original, names, config, i, dtype=torch.float32)
        accumulator = MomentAccumulator(single, 4)
        for n, batch in enumerate(walk.batches):
            inputs, keywords = walk.attention_input(i, walk.states[batch])
            cos, sin = pair_table(keywords["position_embeddings"], weights.key.shape[1] // 2)
            rotation = torch.complex(cos[0, 0].float(), sin[0, 0].float())
            accumulator.update(inputs.float(), rotation, offset=n % 4)
        parameters, shape = convert_layer(
            weights, accumulator.finish(), plan.layers[i], method="gauge", whiten=True
        )
        put_layer(model, source, i, parameters, shape)
        walk.advance(i)
    return model
