"""Plans of a cache coded in bits at several budgets, beside the source's own cache quantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tpa_convert.calibration.moments import Moments
from tpa_convert.conversion.coded import choose_codes
from tpa_convert.conversion.model import convert_model
from tpa_convert.forward.comparison import compare
from tpa_convert.forward.quantised import quantised_source, share_of_bytes
from tpa_convert.planning.search import Candidate, PlanReport, Quantised, choose
from tpa_convert.plans import Plan
from tpa_convert.plans.cost import plan_cost, source_cost
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source

BITS = (8, 4, 3, 2)  # of the source's quantised cache


def search_coded(
    source: Source,
    moments: Moments,
    blocks: Tensor,
    plans: Sequence[Plan],
    *,
    wanted: Plan | None,
    max_increase: float,
    context: int,
    track: Track = no_tracking,
) -> PlanReport:
    """Chooses the codes of every plan, measures what they do to the model, and chooses a plan.

    Args:
        source: a model in fp32.
        moments: of the kind for coded caches, from calibration text.
        blocks: token ids [N, length] that the moments have not seen.
        plans: whose codes are still to be chosen, by falling budget.
        wanted: the one of them that the user's budget gives; None chooses the smallest cache that
            keeps the accepted loss.
        max_increase: the accepted loss.
        context: tokens that arithmetic is counted at.

    Raises:
        UserError: no plan that keeps the accepted loss.
    """
    sizes = source.family.attention_sizes(source.model.config)
    model = source.model
    bits = BITS if quantises(model) else ()
    others = {f"int{n}": quantised_source(model, n) for n in bits}
    scores, agreements = compare(
        {"source": model, **others},
        blocks,
        track=track,
        description="measuring the source's own cache",
    )
    perplexity = scores["source"].perplexity
    quantised = [
        Quantised(n, share_of_bytes(n), agreements[name].kl, scores[name].perplexity / perplexity)
        for n, name in zip(bits, others, strict=True)
    ]
    candidates = [
        _measure(source, moments, blocks, plan, sizes, context)
        for plan in track(plans, "measuring plans")
    ]
    floats = None if wanted is None else wanted.kv_floats
    return PlanReport(
        tuple(candidates),
        choose(candidates, floats, max_increase),
        (),
        source_cost(sizes, context),
        perplexity,
        context,
        tuple(quantised),
    )


def quantises(model: Any) -> bool:
    """Whether `quantised_source` stands for the model's own attention: no cap of its scores."""
    soft = getattr(model.config, "attn_logit_softcapping", None)
    return model.config._attn_implementation == "sdpa" and not soft


def _measure(
    source: Source,
    moments: Moments,
    blocks: Tensor,
    plan: Plan,
    sizes: dict[str, Any],
    context: int,
) -> Candidate:
    codes = choose_codes(plan, moments.layers, moments.num_tokens)
    model = convert_model(source, codes.plan, moments).to(source.model.device)
    scores, agreements = compare({"source": source.model, "model": model}, blocks)
    return Candidate(
        plan.kv_floats,
        codes.plan,
        "static",
        "coded",
        codes.nats,
        agreements["model"].kl,
        scores["model"].perplexity / scores["source"].perplexity,
        plan_cost(codes.plan, sizes, context),
    )
