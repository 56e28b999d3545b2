"""Choose widths by measurement."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tpa_convert.errors import UserError
from tpa_convert.families import family_of
from tpa_convert.options.conversion import BUDGETS
from tpa_convert.options.planning import Objective, PlanOptions
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline.calibration import calibration_blocks, kept_moments, moments_of
from tpa_convert.pipeline.selection import (
    load,
    refuse_other_than_llama,
    source_options,
    usable_device,
)
from tpa_convert.planning.coded import search_coded
from tpa_convert.planning.rates import device_rates
from tpa_convert.planning.search import Candidate, PlanReport, check_multiples, search
from tpa_convert.plans import Budget, Plan, plan_coded, plan_to_yaml, plan_uniform
from tpa_convert.plans.cost import largest_context
from tpa_convert.plans.plan import floats_of_budget
from tpa_convert.plans.speed import DecodeTime
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import read_source_config
from tpa_convert.storage import scratch

CODED_CURVE = (0.25, 0.1875, 0.125, 0.09375, 0.0625)
CURVE = (0.25, 1 / 3, 0.5, 2 / 3, 0.75)  # shares of the source's cache that are measured too


@dataclass(frozen=True)
class PlanningResult:
    """What `plan` found.

    Attributes:
        report: all candidates, and which one was chosen.
        dtype: the source's own type, in which weights are counted.
        source_parameters: of the whole source.
        memory: bytes that weights and cache may take, None if not given.
        batch_size: sequences cached at once.
        objective: what was to be least.
        refined: whether candidates were refined before they were measured.
        source: what the plan is for, as in the plan file.
        seconds: wall time.
    """

    report: PlanReport
    dtype: torch.dtype
    source_parameters: int
    memory: float | None
    batch_size: int
    objective: Objective
    refined: bool
    source: dict[str, Any]
    seconds: float

    def context(self, candidate: Candidate) -> int | None:
        """Largest context that fits into the memory beside the weights of the converted model."""
        if self.memory is None:
            return None
        added = candidate.cost.parameters - self.report.source_cost.parameters
        weight_bytes = (self.source_parameters + added) * self.dtype.itemsize
        kv_bytes = candidate.plan.kv_bytes
        return largest_context(self.memory, weight_bytes, kv_bytes, self.batch_size)

    def to_yaml(self) -> str:
        """The chosen plan as a file for `convert`."""
        return plan_to_yaml(self.report.plan, self.source)

    def to_json(self) -> dict[str, Any]:
        """Plain values; one entry for each candidate and for each layer's sensitivity."""
        report = self.report
        return {
            "source": self.source,
            "objective": self.objective,
            "refined": self.refined,
            "source_perplexity": report.source_perplexity,
            "quantised_source": [asdict(one) for one in report.quantised],
            "source_cost": asdict(report.source_cost),
            "source_decode_seconds": report.times.of_source,
            "rates": asdict(report.times.rates),
            "chosen": report.chosen,
            "candidates": [
                {
                    "budget": candidate.budget,
                    "kv_floats": candidate.plan.kv_floats,
                    "kv_bytes": candidate.plan.kv_bytes,
                    "form": candidate.form,
                    "split": candidate.split,
                    "predicted_kl": candidate.predicted_kl,
                    "kl": candidate.kl,
                    "perplexity_ratio": candidate.perplexity_ratio,
                    "cost": asdict(candidate.cost),
                    "decode_seconds": candidate.decode_seconds,
                    "context": self.context(candidate),
                    "layers": [asdict(layer) for layer in candidate.plan.layers],
                }
                for candidate in report.candidates
            ],
            "sensitivity": [
                {
                    name: {"widths": part.widths, "losses": part.losses}
                    for name, part in (("keys", layer.keys), ("values", layer.values))
                }
                for layer in report.sensitivity
            ],
            "seconds": self.seconds,
        }


def plan(
    source: str | SourceOptions,
    options: PlanOptions,
    *,
    device: str = "auto",
    track: Track = no_tracking,
) -> PlanningResult:
    """Measure how much each layer minds narrower keys and values, and choose their widths.

    An eighth of the calibration text is held out of the moments, and everything is measured on it.

    Args:
        source: Hub id, local directory or .gguf file, or options with a revision.
        options: budget or accepted loss, calibration, memory.
        device: cpu, cuda, cuda:1, ... or auto.
        track: shows progress, called as `track(items, description)`.
    """
    start = time.perf_counter()
    if options.target == "llama":
        refuse_other_than_llama(source)
    where = source_options(source)
    config = read_source_config(
        where.model, revision=where.revision, trust_remote_code=where.trust_remote_code
    )
    stored = config.dtype or torch.float32
    sizes = family_of(config).attention_sizes(config)
    rates = device_rates(torch.device(usable_device(device)))
    times = DecodeTime(sizes, options.context, options.batch_size, rates)
    if options.coded:
        wanted, plans = _coded_plans(sizes, options)
    else:
        kv_floats, curve = _budgets(sizes, options)
    loaded = load(where, device, on_demand=True)
    kept = kept_moments(loaded, options, coded=options.coded)
    held_out, blocks = _split(calibration_blocks(loaded, options, track))
    with scratch(_kept_bytes(sizes, blocks)) as store:
        moments = kept or moments_of(
            loaded, blocks, options, track, coded=options.coded, store=store
        )
        if options.coded:
            report = search_coded(
                loaded,
                moments,
                held_out,
                plans,
                wanted=wanted,
                max_increase=options.max_increase,
                times=times,
                track=track,
            )
        else:
            report = search(
                loaded,
                moments,
                held_out,
                options,
                kv_floats=kv_floats,
                curve=curve,
                rates=rates,
                refinement_text=blocks,
                track=track,
            )
    return PlanningResult(
        report,
        stored,
        loaded.model.num_parameters(),
        None if options.memory is None else options.memory * 1e9,
        options.batch_size,
        options.objective,
        options.refine,
        {"id": loaded.reference.id, "sha256": loaded.reference.sha256},
        time.perf_counter() - start,
    )


def _coded_plans(sizes: dict[str, Any], options: PlanOptions) -> tuple[Plan | None, list[Plan]]:
    """The plan at the wanted budget, and all that are measured, by falling budget.

    Raises:
        UserError: what the options ask for cannot be, told before anything is loaded.
    """

    def at(budget: Budget) -> Plan:
        return plan_coded(sizes, budget, bits=options.code_bits, key_blocks=options.key_blocks)

    wanted = None
    if options.budgets:
        wanted = at(Budget(**{name: getattr(options, name) for name in BUDGETS}))
    plans = []
    for share in CODED_CURVE:
        try:
            plans.append(at(Budget(kv_ratio=share)))
        except UserError:  # a tiny model has no room for rows of so few bytes
            continue
    plans += [wanted] if wanted is not None and wanted not in plans else []
    if not plans:
        at(Budget(kv_ratio=max(CODED_CURVE)))  # says why
    return wanted, sorted(plans, key=lambda plan: plan.kv_bytes, reverse=True)


def _budgets(sizes: dict[str, Any], options: PlanOptions) -> tuple[float | None, list[float]]:
    """The wanted budget in numbers per token and layer, and the others that are measured too.

    Raises:
        UserError: what the options ask for cannot be, told before anything is loaded.
    """
    source_floats = 2 * sizes["num_key_value_heads"] * sizes["head_dim"]
    curve = [share * source_floats for share in CURVE]
    kv_floats = None
    if options.budgets:
        budget = Budget(**{name: getattr(options, name) for name in BUDGETS})
        plan_uniform(sizes, budget)  # refuses what cannot be
        layers = sizes["num_hidden_layers"]
        kv_floats = floats_of_budget(budget, layers, source_floats)
    # Without a budget of the user's, one budget on the curve has to fit.
    largest = max(curve) if kv_floats is None else kv_floats
    check_multiples(sizes, largest, options.multiple_of, options.plain_key_cache)
    return kv_floats, curve


def _kept_bytes(sizes: dict[str, Any], blocks: Tensor) -> int:
    """What a calibration keeps of all layers: moments in fp64, and in fp32 what enters each."""
    width = sizes["num_key_value_heads"] * sizes["head_dim"]
    states = 4 * blocks.numel() * sizes["hidden_size"]
    return sizes["num_hidden_layers"] * (6 * 8 * width**2 + states)


def _split(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """An eighth of the calibration text, held out of the moments, and the rest."""
    held_out = max(1, len(blocks) // 8)
    if len(blocks) <= held_out:
        raise UserError("a plan needs at least two calibration sequences: give more text")
    return blocks[:held_out], blocks[held_out:]
