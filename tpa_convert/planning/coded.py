"""Plans of a cache coded in bits at several budgets, beside the source's own cache quantised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.calibration.moments import Moments
from tpa_convert.conversion.coded import choose_codes
from tpa_convert.conversion.model import Conversion
from tpa_convert.forward.quantised import quantised_attention_name, share_of_bytes
from tpa_convert.planning.search import Candidate, PlanReport, Quantised, choose
from tpa_convert.planning.variants import Variant, compare_variants
from tpa_convert.plans import Plan
from tpa_convert.plans.cost import plan_cost, source_cost
from tpa_convert.plans.speed import DecodeTime
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source, device_of

BITS = (8, 4, 3, 2)  # of the source's quantised cache


def search_coded(
    source: Source,
    moments: Moments,
    blocks: Tensor,
    plans: Sequence[Plan],
    *,
    wanted: Plan | None,
    max_increase: float,
    times: DecodeTime,
    track: Track = no_tracking,
) -> PlanReport:
    """Chooses the codes of every plan, measures what they do to the model, and chooses a plan. The
    model's layers are passed one by one, all plans side by side.

    Args:
        source: a model in fp32.
        moments: of the kind for coded caches, from calibration text.
        blocks: token ids [N, length] that the moments have not seen.
        plans: whose codes are still to be chosen, by falling budget.
        wanted: the one of them that the user's budget gives; None chooses the smallest cache that
            keeps the accepted loss.
        max_increase: the accepted loss.
        times: predicts steps; arithmetic is counted at its context.

    Raises:
        UserError: no plan that keeps the accepted loss.
    """
    sizes = source.family.attention_sizes(source.model.config)
    model = source.model
    device = device_of(model)
    codes = [
        choose_codes(plan, moments.layers, moments.num_tokens, device=device)
        for plan in track(plans, "choosing codes")
    ]
    bits = BITS if quantises(model) else ()
    variants: list[Variant] = [partial(_quantised, model, n) for n in bits]
    variants += [Conversion(source, chosen.plan, moments).in_place for chosen in codes]
    (perplexity, _), *found = compare_variants(source, blocks, variants, track=track)
    quantised = [
        Quantised(n, share_of_bytes(n), kl, other / perplexity)
        for n, (other, kl) in zip(bits, found, strict=False)
    ]
    candidates = [
        Candidate(
            plan.kv_floats,
            chosen.plan,
            "static",
            "coded",
            chosen.nats,
            kl,
            other / perplexity,
            plan_cost(chosen.plan, sizes, times.context),
            times.of(chosen.plan),
        )
        for plan, chosen, (other, kl) in zip(plans, codes, found[len(bits) :], strict=True)
    ]
    floats = None if wanted is None else wanted.kv_floats
    return PlanReport(
        tuple(candidates),
        choose(candidates, floats, max_increase),
        (),
        source_cost(sizes, times.context),
        perplexity,
        times.context,
        times,
        tuple(quantised),
    )


def quantises(model: Any) -> bool:
    """Whether `quantised_source` stands for the model's own attention: no cap of its scores."""
    soft = getattr(model.config, "attn_logit_softcapping", None)
    return model.config._attn_implementation == "sdpa" and not soft


@contextmanager
def _quantised(model: PreTrainedModel, bits: int, index: int) -> Iterator[None]:
    """A `Variant`: the source's own cache in so many bits, in every layer."""
    before = model.config._attn_implementation
    model.set_attn_implementation(quantised_attention_name(bits))
    try:
        yield
    finally:
        model.set_attn_implementation(before)
