"""Plans as YAML files: the per-layer fields of `TPAConfig`, one value or a list over layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from tpa_convert.errors import UserError
from tpa_convert.modeling import LayerShape
from tpa_convert.plans.plan import Plan

# What a conversion finds out is no part of a plan.
FIELDS = tuple(field.name for field in fields(LayerShape) if field.name != "key_pairs")
STRINGS = ("form", "key_gauge", "value_gauge", "key_cache", "key_codes", "value_codes")
OPTIONAL = {
    field.name: field.default for field in fields(LayerShape) if field.default is not MISSING
}
HEADER = "# A plan of tpa-convert, for `tpa-convert convert SOURCE --plan FILE`.\n"


def plan_to_yaml(plan: Plan, source: Mapping[str, Any]) -> str:
    """The file's text.

    Args:
        source: what the plan is for, for the reader (`id`, `sha256`, ...).
    """
    values: dict[str, Any] = {
        "source": dict(source),
        "num_key_value_heads": plan.num_key_value_heads,
        "head_dim": plan.head_dim,
        "kv_floats": round(plan.kv_floats, 3),
    }
    for name in FIELDS:
        column = [getattr(layer, name) for layer in plan.layers]
        values[name] = column[0] if len(set(column)) == 1 else column
    return HEADER + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)


def load_plan(path: Path, sizes: Mapping[str, Any]) -> Plan:
    """Reads a plan for a model with this config.

    Raises:
        UserError: no such file, not a plan, or a plan for a model of other shapes.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no plan at {path}: make one with tpa-convert plan --out {path}") from None
    except OSError as error:
        raise UserError(f"cannot read the plan {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise UserError(f"{path} is not a plan: make one with tpa-convert plan") from None
    if not isinstance(values, dict):
        values = {}
    if "gauge" in values:  # plans written before keys and values had one each
        values = {**values, **_both_gauges(values)}
    if not set(FIELDS) <= set(values) | set(OPTIONAL):
        raise UserError(
            f"{path} is not a plan, which has {', '.join(FIELDS)}: make one with tpa-convert plan"
        )
    values = {**OPTIONAL, "key_norm": sizes["key_norm"], **values}
    for name in ("num_key_value_heads", "head_dim"):
        if values.get(name) != sizes[name]:
            raise UserError(
                f"{path} is for a model with {name} {values.get(name)}, not {sizes[name]}: "
                "make one for this model with tpa-convert plan"
            )
    layers = sizes["num_hidden_layers"]
    columns = {
        name: column if isinstance(column, list) else [column] * layers
        for name, column in ((name, values[name]) for name in FIELDS)
    }
    for name, column in columns.items():
        if len(column) != layers:
            raise UserError(
                f"{path}: {name} has {len(column)} entries for {layers} layers; is the plan for "
                "another model?"
            )
        wanted = str if name in STRINGS else int
        if not all(isinstance(entry, wanted) or entry == OPTIONAL.get(name) for entry in column):
            raise UserError(f"{path}: {name} holds something that is no {wanted.__name__}")
    width = values["num_key_value_heads"] * values["head_dim"]
    shapes = []
    for i, row in enumerate(zip(*columns.values(), strict=True)):
        shape = LayerShape(**dict(zip(columns, row, strict=True)))
        problem = shape.problem(values["head_dim"])
        if problem is None and max(shape.width_k, shape.width_v) > width:
            problem = f"widths above the source's {width}"
        if problem:
            raise UserError(f"{path}, layer {i}: {problem}")
        shapes.append(shape)
    return Plan(shapes, values["num_key_value_heads"], values["head_dim"])


def _both_gauges(values: Mapping[str, Any]) -> dict[str, Any]:
    """The gauges of keys and of values in a plan that has one for both."""
    gauge = values["gauge"]
    latent = values.get("key_cache") == "latent"
    return {"key_gauge": "applied" if latent else gauge, "value_gauge": gauge}
