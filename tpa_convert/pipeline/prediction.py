"""What a conversion would give, from the source's config alone, on the meta device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tpa_convert.decomposition import METHODS
from tpa_convert.decomposition.tensor import tucker_ranks
from tpa_convert.dtypes import dtype_name, named_dtype
from tpa_convert.errors import UserError
from tpa_convert.families import family_of
from tpa_convert.modeling import sliding_window
from tpa_convert.options.conversion import BUDGETS, RANKS, ConvertOptions
from tpa_convert.pipeline.needs import Needs, needs_of
from tpa_convert.plans import Budget, Plan, load_plan, plan_coded, plan_uniform
from tpa_convert.plans.speed import DecodeTime

DECODE_CONTEXT = 32768  # where the cache weighs as much as the weights of attention, or more


@dataclass(frozen=True)
class Prediction:
    """A plan and what follows from it.

    Attributes:
        plan: ranks and widths of every layer.
        dtype: of the weights to be written.
        source_kv_bytes, kv_bytes: cached per token by the whole model, before and after; numbers
            have 16 bits.
        source_parameters, parameters: before and after; tied ones count once. While codes are
            still to be chosen, those after are approximate: they count layers of full width.
        source_decode_seconds, decode_seconds: that attention layers on an H100 need at least for
            one token after `DECODE_CONTEXT` cached ones, before and after.
        windows: tokens that each layer attends to, None for all.
        needs: memory, disk and time that the conversion takes; None unless they were asked for.
    """

    plan: Plan
    dtype: torch.dtype
    source_kv_bytes: int
    kv_bytes: int
    source_parameters: int
    parameters: int
    source_decode_seconds: float
    decode_seconds: float
    windows: tuple[int | None, ...] = ()
    needs: Needs | None = None

    @property
    def approximate(self) -> bool:
        """Whether `parameters` is only about right."""
        return self.plan.coded is not None

    def cached_at(self, context: int) -> tuple[float, float]:
        """Bytes of one sequence of `context` tokens, before and after. Layers with a window keep no
        more tokens than that; while codes are still to be chosen, all get the same share."""
        plan, count = self.plan, len(self.plan.layers)
        before, after = [plan.source_kv_bytes / count] * count, [plan.kv_bytes / count] * count
        if plan.coded is None:
            after = [x.cached_bytes(plan.num_key_value_heads) for x in plan.layers]
        tokens = [min(context, window or context) for window in self.windows]
        return (
            sum(n * x for n, x in zip(tokens, before, strict=True)),
            sum(n * x for n, x in zip(tokens, after, strict=True)),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; `layers` has one entry per layer, with its codes if these are chosen, and
        `coded` says what they are to be chosen by if not."""
        return {
            "dtype": dtype_name(self.dtype),
            "source_kv_floats": self.plan.source_kv_floats,
            "kv_floats": self.plan.kv_floats,
            "source_kv_bytes": self.source_kv_bytes,
            "kv_bytes": self.kv_bytes,
            "source_parameters": self.source_parameters,
            "parameters": self.parameters,
            "parameters_approximate": self.approximate,
            "windows": list(self.windows),
            "source_decode_seconds": self.source_decode_seconds,
            "decode_seconds": self.decode_seconds,
            "coded": self.plan.coded and asdict(self.plan.coded),
            "layers": [asdict(layer) for layer in self.plan.layers],
            **({} if self.needs is None else {"needs": asdict(self.needs)}),
        }


def predict(
    config: PreTrainedConfig,
    options: ConvertOptions,
    *,
    trust_remote_code: bool = False,
    with_needs: bool = False,
) -> Prediction:
    """Plan the conversion of a model with this config, and count what follows.

    Args:
        trust_remote_code: whether the model's own code may run, to count its parameters.
        with_needs: whether to say too what the conversion needs of this machine.

    Raises:
        UserError: an impossible budget, or a family that cannot be converted.
    """
    family = family_of(config)
    dtype = named_dtype(options.dtype) if options.dtype else config.dtype or torch.float32
    sizes = family.attention_sizes(config)
    whole_heads = METHODS[options.method].whole_heads
    heads = sizes["num_attention_heads"]
    if options.rank_q is not None and options.rank_q > heads:
        raise UserError(f"`rank_q` is at most the number of query heads, {heads}: give less")
    if options.plan is not None:
        plan = load_plan(options.plan, sizes).with_gauge(options.gauge)
        if whole_heads:
            raise UserError(f"the {options.method} method keeps whole heads: leave out --plan")
    else:
        budget = Budget(**{name: getattr(options, name) for name in (*BUDGETS, *RANKS)})
        if options.coded:
            plan = plan_coded(sizes, budget, bits=options.code_bits, key_blocks=options.key_blocks)
        else:
            plan = plan_uniform(
                sizes,
                budget,
                form=options.form,
                gauge=options.gauge,
                whole_heads=whole_heads,
                rank_q=options.rank_q,
                key_cache=options.plain_key_cache,
            )
    if options.method == "tucker":
        groups, head_dim = plan.num_key_value_heads, plan.head_dim
        for width in {layer.width_v for layer in plan.layers}:
            if not tucker_ranks(width, groups, head_dim):
                raise UserError(
                    f"the tucker method cannot make {width} value features of up to {groups} heads "
                    f"with up to {head_dim} features each: choose another budget or `width_v`"
                )
    try:
        tpa_config = family.tpa_config(config, [asdict(layer) for layer in plan.layers])
    except ValueError as error:  # shapes that do not go together
        raise UserError(str(error)) from error
    try:
        with torch.device("meta"):
            source = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=family.attention_implementation,
                trust_remote_code=trust_remote_code,
            )
            converted = family.causal_lm(tpa_config)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # whatever a model's code has against a config
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"no model can be made with this config.json ({reason}): check its values, or download "
            "it again"
        ) from error
    times, needs = DecodeTime(sizes, DECODE_CONTEXT), None
    text = config.get_text_config()
    if with_needs:
        attention, parameters = family.names.attention, converted.num_parameters()
        needs = needs_of(source, attention, plan, parameters, options, dtype)
    return Prediction(
        plan=plan,
        dtype=dtype,
        source_kv_bytes=plan.source_kv_bytes,
        kv_bytes=round(plan.kv_bytes),
        source_parameters=source.num_parameters(),
        parameters=converted.num_parameters(),
        source_decode_seconds=times.of_source,
        decode_seconds=times.of(plan),
        windows=tuple(sliding_window(None, text, i) for i in range(len(plan.layers))),
        needs=needs,
    )
