"""From a cache budget to the ranks and widths of every layer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

from tpa_convert.errors import UserError
from tpa_convert.modeling import Form, Gauge, KeyCache, LayerShape

NUMBER_BYTES = 2  # of a number in the cache
LATENT_KEY_SHARE = 3 / 8  # keys need less than values where all rotary pairs share components


@dataclass(frozen=True)
class Budget:
    """What the cache may hold: one of three ways to say it, or ranks and widths outright.

    Args:
        kv_floats: numbers cached per token and layer, mean over layers.
        kv_bytes: bytes cached per token by the whole model.
        kv_ratio: share of the source's cache that is kept, in (0, 1].
        rank_k, rank_v: number of head factors; the width is then rank * head_dim unless given.
        width_k, width_v: feature numbers cached per token and layer.
    """

    kv_floats: float | None = None
    kv_bytes: float | None = None
    kv_ratio: float | None = None
    rank_k: int | None = None
    rank_v: int | None = None
    width_k: int | None = None
    width_v: int | None = None

    @property
    def outright(self) -> bool:
        """Whether ranks or widths are given."""
        return any(
            value is not None for value in (self.rank_k, self.rank_v, self.width_k, self.width_v)
        )


@dataclass(frozen=True)
class CodedBudget:
    """How codes are to be chosen, once it is known what the model does on text.

    Args:
        total_bytes: of one token in all layers.
        key_blocks: of rotary pairs.
        align: see `LayerShape.row_align`.
        bits: mean over the components that are kept; None keeps as many as is best.
        predict_values: see `LayerShape`.
    """

    total_bytes: int
    key_blocks: int
    align: int
    bits: int | None = None
    predict_values: bool = True


@dataclass(frozen=True)
class Plan:
    """Per-layer shapes of a conversion.

    Args:
        layers: one shape per layer.
        num_key_value_heads, head_dim: of the source.
        rank_limit_k: most components on one rotary pair of a static layer, None for no limit.
        coded: of a cache whose codes are still to be chosen, the budget; the layers then say only
            how large the source's are.
    """

    layers: list[LayerShape]
    num_key_value_heads: int
    head_dim: int
    rank_limit_k: int | None = None
    coded: CodedBudget | None = None

    @property
    def is_coded(self) -> bool:
        """Whether codes of bits are cached, chosen or still to be chosen."""
        return self.coded is not None or any(layer.coded for layer in self.layers)

    @property
    def kv_floats(self) -> float:
        """Numbers cached per token and layer, mean over layers; codes count as 16-bit numbers."""
        if self.is_coded:
            return self.kv_bytes / (NUMBER_BYTES * len(self.layers))
        total = sum(layer.cached_floats(self.num_key_value_heads) for layer in self.layers)
        return total / len(self.layers)

    @property
    def source_kv_floats(self) -> int:
        """The same of the source."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def kv_bytes(self) -> float:
        """Bytes cached per token by the whole model; numbers have 16 bits, whatever the model's
        type is."""
        if self.coded is not None:
            return self.coded.total_bytes
        if self.is_coded:
            return sum(layer.cached_bytes(self.num_key_value_heads) for layer in self.layers)
        return self.kv_floats * len(self.layers) * NUMBER_BYTES

    @property
    def source_kv_bytes(self) -> int:
        """Bytes that the source caches per token, at 16 bits a number."""
        return self.source_kv_floats * len(self.layers) * NUMBER_BYTES

    def with_gauge(self, gauge: Gauge | Literal["auto"]) -> Plan:
        """The same widths with the gauge of every layer in one place; `auto` changes nothing."""
        if gauge == "auto" or self.is_coded:
            return self
        layers = [
            replace(
                layer,
                key_gauge=layer.key_gauge if stays_applied(layer) else gauge,
                value_gauge=gauge,
            )
            for layer in self.layers
        ]
        return replace(self, layers=layers)


def stays_applied(shape: LayerShape) -> bool:
    """Whether the gauge of the keys cannot be absorbed, wherever that of the values is."""
    return shape.latent_keys or bool(shape.key_norm)


def norm_floats(sizes: dict[str, Any], key_cache: KeyCache) -> int:
    """Numbers per token that static layers cache beside their widths: a norm for each key head."""
    cached = sizes["key_norm"] is True and key_cache == "rotated"
    return sizes["num_key_value_heads"] if cached else 0


def floats_of_budget(budget: Budget, num_layers: int, source_floats: int) -> float:
    """Numbers per token and layer that a budget given as floats, bytes or ratio allows."""
    given = [v for v in (budget.kv_floats, budget.kv_bytes, budget.kv_ratio) if v is not None]
    if len(given) != 1 or budget.outright:
        raise UserError(
            "give the budget once: --kv-floats, --kv-bytes or --kv-ratio, or ranks and widths"
        )
    if budget.kv_floats is not None:
        return budget.kv_floats
    if budget.kv_bytes is not None:
        return budget.kv_bytes / (num_layers * NUMBER_BYTES)
    assert budget.kv_ratio is not None
    return budget.kv_ratio * source_floats


def plan_uniform(
    sizes: dict[str, Any],
    budget: Budget,
    *,
    form: Form = "static",
    whole_heads: bool = False,
    gauge: Gauge | Literal["auto"] = "auto",
    rank_q: int | None = None,
    key_cache: KeyCache = "rotated",
) -> Plan:
    """The same shape for every layer and as much as possible of the budget: half for keys and half
    for values, or three eighths for latent keys.

    Args:
        sizes: `Family.sizes` of the source.
        budget: what the cache may hold.
        form: `static`, `affine` or `linear`.
        whole_heads: widths are multiples of the head dim and contextual layers have no gauge (the
            `svd` method: the layer of the paper).
        gauge: `absorbed`, `applied`, or `auto`: absorbed while neither width exceeds the head dim,
            because beyond that the query and output projections would grow.
        rank_q: rank of factored queries.
        key_cache: `rotated` or `latent`, see `LayerShape`.

    Raises:
        UserError: a budget below the minimum or above the source, or shapes that cannot be built.
    """
    groups, head_dim = sizes["num_key_value_heads"], sizes["head_dim"]
    num_layers = sizes["num_hidden_layers"]
    source_floats = 2 * groups * head_dim
    if budget.outright:
        given = (budget.kv_floats, budget.kv_bytes, budget.kv_ratio)
        if any(value is not None for value in given):
            raise UserError("give either a --kv-* budget or ranks and widths, not both")
        rank_k, width_k = outright(budget.rank_k, budget.width_k, form, groups, head_dim)
        rank_v, width_v = outright(budget.rank_v, budget.width_v, form, groups, head_dim)
    else:
        floats = floats_of_budget(budget, num_layers, source_floats)
        if floats > source_floats:
            raise UserError(
                f"a budget of {floats:,.10g} numbers per token and layer is above the source's "
                f"{source_floats}: nothing to convert"
            )
        if key_cache == "latent":
            width_k, width_v = divide_latent(int(floats), groups, head_dim)
            rank_k, rank_v = -(-width_k // head_dim), -(-width_v // head_dim)
        else:
            divide = divide_heads if whole_heads else divide_features
            rest = int(floats) - (norm_floats(sizes, key_cache) if form == "static" else 0)
            rank_k, width_k, rank_v, width_v = divide(rest, form, groups, head_dim)

    if whole_heads and (width_k % head_dim or width_v % head_dim):
        raise UserError(
            f"the svd method keeps whole heads: widths must be multiples of {head_dim}, "
            f"not {width_k} and {width_v}"
        )
    if width_k > groups * head_dim or width_v > groups * head_dim:
        raise UserError(
            f"width_k={width_k} and width_v={width_v} exceed the source's {groups * head_dim} keys "
            f"and {groups * head_dim} values per token and layer: there is nothing more to keep"
        )
    rank_limit_k = budget.rank_k if form == "static" else None
    if rank_limit_k is not None and width_k > rank_limit_k * head_dim:
        raise UserError(
            f"rank_k={rank_limit_k} leaves room for a width_k of at most "
            f"{rank_limit_k * head_dim}, not {width_k}"
        )
    shape = LayerShape(
        form,
        *places_of_gauges(gauge, width_k, width_v, sizes, key_cache),
        rank_k,
        rank_v,
        width_k,
        width_v,
        key_cache,
        key_norm=sizes["key_norm"],
        rank_q=rank_q,
    )
    if whole_heads and form != "static":
        shape = replace(shape, key_gauge="none", value_gauge="none")
    problem = shape.problem(head_dim)
    if problem:
        raise UserError(problem)
    plan = Plan(
        [shape] * num_layers,
        groups,
        head_dim,
        rank_limit_k=rank_limit_k,
    )
    if plan.kv_floats >= source_floats:
        warnings.warn(
            f"these ranks and widths cache {plan.kv_floats:g} numbers per token and layer, "
            f"the source caches {source_floats}: nothing is saved",
            stacklevel=2,
        )
    return plan


def plan_widths(
    widths: list[tuple[int, int]],
    sizes: dict[str, Any],
    *,
    gauge: Gauge | Literal["auto"] = "auto",
    key_cache: KeyCache = "rotated",
) -> Plan:
    """Static layers of the given (width_k, width_v), one pair for each layer."""
    groups, head_dim = sizes["num_key_value_heads"], sizes["head_dim"]
    layers = [
        LayerShape(
            "static",
            *places_of_gauges(gauge, width_k, width_v, sizes, key_cache),
            -(-width_k // head_dim),
            -(-width_v // head_dim),
            width_k,
            width_v,
            key_cache,
            key_norm=sizes["key_norm"],
        )
        for width_k, width_v in widths
    ]
    return Plan(layers, groups, head_dim)


def places_of_gauges(
    gauge: Gauge | Literal["auto"],
    width_k: int,
    width_v: int,
    sizes: dict[str, Any],
    key_cache: KeyCache,
) -> tuple[Gauge, Gauge]:
    """Where the gauges of keys and of values go.

    `auto` is absorbed while that makes neither the queries nor the output projection grow. That of
    latent keys, and of keys that are normalised, is always applied, so that their width does not
    matter.
    """
    applied = key_cache == "latent" or sizes["key_norm"]
    widest = width_v if applied else max(width_k, width_v)
    if gauge == "auto":
        gauge = "absorbed" if widest <= sizes["head_dim"] else "applied"
    return ("applied" if applied else gauge), gauge


def outright(
    rank: int | None, width: int | None, form: str, groups: int, head_dim: int
) -> tuple[int, int]:
    """Rank and width of keys or values from what the user gave; the whole head space by default."""
    if rank is None:
        width = groups * head_dim if width is None else width
        rank = max(1, -(-width // head_dim)) if form == "static" else 1
    return rank, rank * head_dim if width is None else width


def ranks_and_head_factors(form: str, groups: int) -> tuple[int, int]:
    """Rank of keys and of values in a budget, and the numbers that their head factors cache."""
    if form == "static":
        return 1, 0
    rank = min(2, groups)
    return rank, 2 * rank * groups


def smallest_budget(form: str, groups: int) -> int:
    """Numbers per token and layer that `divide_features` needs: two features for each rank of the
    keys, one for each of the values, and the head factors."""
    rank, head_factors = ranks_and_head_factors(form, groups)
    return head_factors + 3 * rank


def divide_features(
    floats: int, form: str, groups: int, head_dim: int
) -> tuple[int, int, int, int]:
    """(rank_k, width_k, rank_v, width_v) that fill a budget, half for keys and half for values."""
    rank, head_factors = ranks_and_head_factors(form, groups)
    minimum = smallest_budget(form, groups)
    if floats < minimum:
        raise UserError(
            f"a budget of {floats} numbers per token and layer is too small: "
            f"the {form} form needs at least {minimum}"
        )
    features = floats - head_factors
    width_k = min(max(features // 2, 2 * rank), groups * head_dim)
    width_k -= width_k % (2 * rank)
    width_v = min(features - width_k, groups * head_dim)
    width_v -= width_v % rank
    if form == "static":
        return -(-width_k // head_dim), width_k, -(-width_v // head_dim), width_v
    return rank, width_k, rank, width_v


def divide_latent(floats: int, groups: int, head_dim: int) -> tuple[int, int]:
    """(width_k, width_v) of latent keys and values that fill a budget; width_k is a multiple of 8
    unless the budget is tiny."""
    if floats < 2:
        raise UserError(
            f"a budget of {floats} numbers per token and layer is too small: latent keys need at "
            "least 2"
        )
    step = 8 if floats >= 32 else 1
    width_k = max(step, round(LATENT_KEY_SHARE * floats / step) * step)
    width_k = max(width_k, floats - groups * head_dim)  # what values have no use for
    return width_k, floats - width_k


def divide_heads(floats: int, form: str, groups: int, head_dim: int) -> tuple[int, int, int, int]:
    """As `divide_features`, in whole heads; an odd one goes to the keys, which are the harder."""
    cost = head_dim + (0 if form == "static" else groups)
    total = floats // cost
    if total < 2:
        raise UserError(
            f"a budget of {floats} numbers per token and layer is too small: "
            f"the svd method needs at least {2 * cost}"
        )
    rank_v = min(total // 2, groups)
    rank_k = min(total - rank_v, groups)
    return rank_k, rank_k * head_dim, rank_v, rank_v * head_dim
