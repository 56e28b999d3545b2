"""Chooses widths by measurement: plans at several budgets, predicted and measured, and the best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tpa_convert.calibration.moments import Moments
from tpa_convert.conversion.model import Conversion
from tpa_convert.conversion.shared_pairs import share_pairs
from tpa_convert.errors import UserError
from tpa_convert.modeling import Form, KeyCache
from tpa_convert.options.planning import PlanOptions
from tpa_convert.planning.sensitivity import LayerSensitivity, measure_sensitivity
from tpa_convert.planning.variants import Variant, compare_variants
from tpa_convert.plans import Budget, Plan, plan_uniform, plan_widths
from tpa_convert.plans.allocation import allocate
from tpa_convert.plans.cost import Cost, plan_cost, source_cost
from tpa_convert.plans.plan import norm_floats, smallest_budget
from tpa_convert.plans.speed import AS_FAST, H100, DecodeTime, Rates
from tpa_convert.progress import Track, no_tracking
from tpa_convert.refinement.adaptation import AdaptedConversion
from tpa_convert.refinement.regression import RefinementSettings, refinement
from tpa_convert.sources import Source

Split = Literal["uniform", "halfway", "measured", "coded"]
CONTEXTUAL: tuple[Form, ...] = ("affine", "linear")


@dataclass(frozen=True)
class Candidate:
    """A plan and what it does to the model on held-out calibration text.

    Attributes:
        budget: numbers per token and layer that the plan had to keep to.
        plan: shapes of the layers.
        form: of all layers.
        split: `uniform` over layers and between keys and values, by `measured` sensitivity, or
            `halfway` between the two. `coded`: in bits, which need no sensitivity.
        predicted_kl: sum of the losses of all parts, nats per token; None for contextual forms, and
            where no sensitivity was measured.
        kl: measured, KL(source ‖ model) in nats per token.
        perplexity_ratio: measured, to the source's.
        cost: of the attention layers, at the report's context.
        decode_seconds: that a step of the attention layers takes at least; see `DecodeTime`.
    """

    budget: float
    plan: Plan
    form: Form
    split: Split
    predicted_kl: float | None
    kl: float
    perplexity_ratio: float
    cost: Cost
    decode_seconds: float


@dataclass(frozen=True)
class Quantised:
    """The source with its own cache quantised, on the same text.

    Attributes:
        bits: of a number.
        share: of the bytes of the source's cache, scales counted.
        kl, perplexity_ratio: see `Candidate`.
    """

    bits: int
    share: float
    kl: float
    perplexity_ratio: float


@dataclass(frozen=True)
class PlanReport:
    """Everything that was measured, and which candidate was chosen.

    Attributes:
        candidates: by falling budget; at each, the uniform plan first.
        chosen: index of the best candidate at the wanted budget.
        sensitivity: of every layer.
        source_cost: of the source's attention layers.
        source_perplexity: on the same text.
        context: tokens that `decode_flops` and `prefill_flops` are counted at.
        times: what predicted the time of a step.
        quantised: the source's quantised caches, where they were measured.
    """

    candidates: tuple[Candidate, ...]
    chosen: int
    sensitivity: tuple[LayerSensitivity, ...]
    source_cost: Cost
    source_perplexity: float
    context: int
    times: DecodeTime
    quantised: tuple[Quantised, ...] = ()

    @property
    def plan(self) -> Plan:
        """The chosen one."""
        return self.candidates[self.chosen].plan


def least_floats(sizes: dict[str, Any], multiple_of: int, key_cache: KeyCache) -> int:
    """Numbers per token and layer that `plan_measured` needs: one multiple for each part, and the
    norms of keys."""
    return 2 * multiple_of + norm_floats(sizes, key_cache)


def check_multiples(
    sizes: dict[str, Any], kv_floats: float, multiple_of: int, key_cache: KeyCache
) -> None:
    """Refuses what `plan_measured` could not fill, before anything is measured for it.

    Raises:
        UserError: a budget too small for one multiple a part, or multiples that do not fit.
    """
    width = sizes["num_key_value_heads"] * sizes["head_dim"]
    if multiple_of < 2 or multiple_of % 2 or width % multiple_of:
        raise UserError(
            f"widths cannot be multiples of {multiple_of}: give an even divisor of {width}"
        )
    least = least_floats(sizes, multiple_of, key_cache)
    if kv_floats < least:
        raise UserError(
            f"widths in multiples of {multiple_of} need a budget of at least "
            f"{least} numbers per token and layer: lower --multiple-of or "
            "give a larger budget"
        )


def plan_measured(
    sensitivity: Sequence[LayerSensitivity],
    sizes: dict[str, Any],
    kv_floats: float,
    multiple_of: int = 8,
    key_cache: KeyCache = "rotated",
) -> Plan:
    """Static widths that minimise the sum of the parts' losses within a budget.

    Args:
        sensitivity: of every layer.
        kv_floats: numbers cached per token and layer, mean over layers.
        multiple_of: of which every width is a multiple; even.
        key_cache: the kind of keys that the sensitivity is of.

    Raises:
        UserError: a budget too small for one multiple a part, or multiples that do not fit.
    """
    check_multiples(sizes, kv_floats, multiple_of, key_cache)
    width = sizes["num_key_value_heads"] * sizes["head_dim"]
    grid = torch.arange(multiple_of, width + 1, multiple_of)
    curves = [part.loss(grid) for layer in sensitivity for part in (layer.keys, layer.values)]
    widths_floats = (kv_floats - norm_floats(sizes, key_cache)) * len(sensitivity)
    units = min(int(widths_floats) // multiple_of, len(curves) * len(grid))
    widths = [multiple_of * count for count in allocate(curves, units)]
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    return plan_widths(pairs, sizes, key_cache=key_cache)


def plan_between(first: Plan, second: Plan, sizes: dict[str, Any]) -> Plan:
    """Static widths halfway between two plans of the same keys, rounded down (keys to even
    widths)."""
    widths = [
        ((a.width_k + b.width_k) // 4 * 2, (a.width_v + b.width_v) // 2)
        for a, b in zip(first.layers, second.layers, strict=True)
    ]
    return plan_widths(widths, sizes, key_cache=first.layers[0].key_cache)


def predicted_loss(plan: Plan, sensitivity: Sequence[LayerSensitivity]) -> float:
    """Sum of the losses of all parts of a static plan, nats per token."""
    return math.fsum(
        part.loss(torch.tensor(width)).item()
        for shape, layer in zip(plan.layers, sensitivity, strict=True)
        for part, width in ((layer.keys, shape.width_k), (layer.values, shape.width_v))
    )


def search(
    source: Source,
    moments: Moments,
    blocks: Tensor,
    options: PlanOptions,
    *,
    kv_floats: float | None,
    curve: Sequence[float],
    rates: Rates = H100,
    refinement_text: Tensor | None = None,
    track: Track = no_tracking,
) -> PlanReport:
    """Measures sensitivities and candidate plans, and chooses.

    Args:
        source: a model in fp32.
        moments: of the source on calibration text.
        blocks: token ids [N, length] that the moments have not seen.
        options: kind of keys, gauge, target, multiples of widths, accepted loss, what is to be
            least within that, refinement. For a
            Llama, whose layers are all as wide, only uniform widths are measured.
        kv_floats: the wanted budget, in numbers per token and layer; the best candidate there is
            chosen, contextual forms included where they fit. None chooses the smallest cache that
            keeps the accepted loss, told from the divergence: exp(KL) − 1.
        curve: further budgets to measure; those too small for the multiples are left out.
        rates: of the device that steps are predicted for.
        refinement_text: what every candidate is refined on before it is measured, if the options
            say so: what the closed form can spare is not what refinement can.

    Raises:
        UserError: an impossible budget, or no budget on the curve that keeps the accepted loss.
    """
    sizes = source.family.attention_sizes(source.model.config)
    # Sensitivities run most of the model for each part: a quarter of the text is enough for them.
    few = blocks[: max(1, len(blocks) // 4)]
    sensitivity: Sequence[LayerSensitivity] = ()
    if options.target is None:
        sensitivity = measure_sensitivity(
            source, moments, few, key_cache=options.plain_key_cache, track=track
        )
    wanted = [] if kv_floats is None else [kv_floats]
    least = least_floats(sizes, options.multiple_of, options.plain_key_cache)
    fitting = [floats for floats in curve if floats >= least]
    proposals = [
        proposal
        for floats in sorted({*fitting, *wanted}, reverse=True)
        for proposal in _proposals(
            floats, sensitivity, sizes, options, with_contextual=floats == kv_floats
        )
    ]
    refined_on = refinement_text if options.refine else None
    times = DecodeTime(sizes, options.context, options.batch_size, rates)
    plans = [
        share_pairs(proposal.plan, moments) if options.target == "llama" else proposal.plan
        for proposal in proposals
    ]
    # Side by side, but one by one where each has to keep what enters its layers on the whole text.
    groups = [plans] if refined_on is None else [[plan] for plan in plans]
    outer, inner = (no_tracking, track) if refined_on is None else (track, no_tracking)
    source_perplexity, losses = math.nan, list[tuple[float, float]]()
    for group in outer(groups, "measuring plans"):
        variants = [_variant(source, plan, moments, options, refined_on) for plan in group]
        (source_perplexity, _), *found = compare_variants(source, blocks, variants, track=inner)
        losses += found
    candidates = [
        Candidate(
            proposal.budget,
            plan,
            proposal.form,
            proposal.split,
            predicted_loss(plan, sensitivity)
            if sensitivity and proposal.form == "static"
            else None,
            kl,
            perplexity / source_perplexity,
            plan_cost(plan, sizes, options.context),
            times.of(plan),
        )
        for proposal, plan, (perplexity, kl) in zip(proposals, plans, losses, strict=True)
    ]
    return PlanReport(
        tuple(candidates),
        choose(
            candidates,
            kv_floats,
            options.max_increase,
            times if options.objective == "speed" else None,
        ),
        tuple(sensitivity),
        source_cost(sizes, options.context),
        source_perplexity,
        options.context,
        times,
    )


@dataclass(frozen=True)
class _Proposal:
    """A plan that is to be measured; see `Candidate`."""

    budget: float
    plan: Plan
    form: Form
    split: Split


def _proposals(
    floats: float,
    sensitivity: Sequence[LayerSensitivity],
    sizes: dict[str, Any],
    options: PlanOptions,
    with_contextual: bool,
) -> Iterator[_Proposal]:
    """The plans at one budget, the uniform one first."""
    key_cache, gauge = options.plain_key_cache, options.gauge
    uniform = plan_uniform(sizes, Budget(kv_floats=floats), key_cache=key_cache)
    if options.target == "llama":
        yield _Proposal(floats, uniform.with_gauge(gauge), "static", "uniform")
        return
    uneven = plan_measured(sensitivity, sizes, floats, options.multiple_of, key_cache)
    between = plan_between(uniform, uneven, sizes)
    yield _Proposal(floats, uniform.with_gauge(gauge), "static", "uniform")
    yield _Proposal(floats, between.with_gauge(gauge), "static", "halfway")
    yield _Proposal(floats, uneven.with_gauge(gauge), "static", "measured")
    if not with_contextual or key_cache != "rotated":  # other forms have no latent keys
        return
    for form in CONTEXTUAL:
        if floats >= smallest_budget(form, sizes["num_key_value_heads"]):
            plan = plan_uniform(sizes, Budget(kv_floats=floats), form=form)
            yield _Proposal(floats, plan, form, "uniform")


def _variant(
    source: Source,
    plan: Plan,
    moments: Moments,
    options: PlanOptions,
    refined_on: Tensor | None,
) -> Variant:
    """The source converted by a plan, and refined if there is a text for it."""
    conversion = Conversion(source, plan, moments)
    if refined_on is None:
        return conversion.in_place
    way = refinement(RefinementSettings(steps=options.refine_steps, seed=options.seed))
    return AdaptedConversion(conversion, way, refined_on, {}).in_place


def choose(
    candidates: Sequence[Candidate],
    kv_floats: float | None,
    max_increase: float,
    times: DecodeTime | None = None,
) -> int:
    """Index of the best candidate; see `search`.

    Uniform plans win ties, being easier on kernels and compilers.

    Args:
        times: where decoding is to be fast, what predicted it. Of the candidates that are no slower
            than the source, those that take the least time are kept, and the best of these chosen.

    Raises:
        UserError: no candidate keeps the accepted loss, or none is as fast as the source.
    """
    kept = list(range(len(candidates)))
    if kv_floats is not None:
        kept = [i for i in kept if candidates[i].budget == kv_floats]
    else:
        # By the divergence: on a short text the perplexity itself may happen to fall.
        kept = [i for i in kept if math.expm1(candidates[i].kl) <= max_increase]
    if not kept:
        best = min(math.expm1(candidate.kl) for candidate in candidates)
        raise UserError(
            f"no budget on the curve keeps the loss within {100 * max_increase:.3g}% (the best "
            f"loses {100 * best:.3g}%): allow more with --max-increase, or refine and heal"
        )
    if times is not None:
        least = min(candidates[i].decode_seconds for i in kept)
        if least > times.of_source:
            raise UserError(
                f"no plan decodes as fast as the source at {times.context:,} tokens, batch "
                f"{times.batch}: give a smaller budget, or a longer --context"
            )
        kept = [i for i in kept if candidates[i].decode_seconds <= AS_FAST * least]
    if kv_floats is not None or times is not None:
        return min(kept, key=lambda i: candidates[i].kl)
    return min(kept, key=lambda i: (candidates[i].plan.kv_floats, candidates[i].kl))
