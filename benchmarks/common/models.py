"""Sources, and conversions of them as a run names them.

A run is a number of floats, widths K+V, or a plan.yaml of `tpa-convert plan`, and after colons: a
gauge (`absorbed`, `applied`), `latent` keys, a contextual form (`affine`, `linear`), and `measured`
for widths by sensitivity or `halfway` for the mean of these and uniform ones. Of a plan.yaml only
the gauge is to be given. Example: 128:latent:absorbed.

A run of a coded cache is the share of the source's 16-bit cache that is kept, in percent; behind
colons a number of blocks of rotary pairs, and `alone` for values that are not predicted from the
keys. Example: 12.5:4:alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.calibration.moments import Moments, collect_moments
from tpa_convert.conversion.coded import choose_codes
from tpa_convert.conversion.model import convert_model
from tpa_convert.planning.search import plan_between, plan_measured
from tpa_convert.planning.sensitivity import LayerSensitivity
from tpa_convert.plans import Budget, Plan, load_plan, plan_coded, plan_uniform
from tpa_convert.sources import Source, load_source

MULTIPLE_OF = 16  # few distinct shapes, for the compiler's sake


def plan_of(run: str, config: dict[str, Any], sensitivity: Sequence[LayerSensitivity] = ()) -> Plan:
    """The plan of a run."""
    size, *options = run.split(":")

    def option(*names: str, default: str) -> Any:
        return next((option for option in options if option in names), default)

    gauge = option("absorbed", "applied", default="auto")
    if size.endswith(".yaml"):
        return load_plan(Path(size), config).with_gauge(gauge)
    key_cache = option("latent", default="rotated")
    form = option("affine", "linear", default="static")
    budget = Budget(kv_floats=float(size)) if "+" not in size else None
    if budget is None:
        width_k, width_v = map(int, size.split("+"))
        budget = Budget(width_k=width_k, width_v=width_v)
    uniform = plan_uniform(config, budget, form=form, gauge=gauge, key_cache=key_cache)
    if not {"measured", "halfway"} & set(options):
        return uniform
    plan = plan_measured(sensitivity, config, float(size), MULTIPLE_OF, key_cache)
    if "halfway" in options:
        plan = plan_between(uniform, plan, config)
    return plan.with_gauge(gauge)


@dataclass
class Conversions:
    """Converts a source; it is calibrated when that is first needed."""

    source: Source
    blocks: Tensor
    moments: Moments | None = None

    def __call__(self, plan: Plan) -> tuple[PreTrainedModel, float]:
        """The converted model on the source's device, and the seconds that it took."""
        if self.moments is None:
            start = time.perf_counter()
            self.moments = collect_moments(self.source, self.blocks)
            seconds = time.perf_counter() - start
            print(f"<!-- calibration on {self.blocks.numel():,} tokens {seconds:.1f} s -->")
        start = time.perf_counter()
        model = convert_model(self.source, plan, self.moments).to(self.source.model.device)
        return model, time.perf_counter() - start


def source_heads(source: Source) -> int:
    """Numbers of one key (or value) over all heads."""
    config = source.family.attention_sizes(source.model.config)
    return config["num_key_value_heads"] * config["head_dim"]


def load(path: str) -> Source:
    """The source in fp32, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_source(Path(path), device=device)


def coded_model(source: Source, moments: Moments, run: str) -> tuple[PreTrainedModel, float]:
    """The coded model of a run, and the numbers of 16 bits that a token and layer takes."""
    share, *options = run.split(":")
    blocks = next((int(option) for option in options if option.isdecimal()), None)
    sizes = source.family.attention_sizes(source.model.config)
    plan = plan_coded(sizes, Budget(kv_ratio=float(share) / 100), key_blocks=blocks)
    if "alone" in options and plan.coded is not None:
        plan = replace(plan, coded=replace(plan.coded, predict_values=False))
    codes = choose_codes(plan, moments.layers, moments.num_tokens)
    kept = codes.plan.kv_floats
    print(f"<!-- {run}: {2 * kept:.1f} bytes a token and layer, {codes.nats:.4f} nats expected -->")
    return convert_model(source, codes.plan, moments).to(source.model.device), kept
