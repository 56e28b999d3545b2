"""What `inspect` shows: a table, the layers, and how the model came to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from tpa_convert.cli.tables import ranges, show_layers
from tpa_convert.cli.terminal import console
from tpa_convert.export.inspection import HealingStep, Inspection
from tpa_convert.modeling import LayerShape

BARS = "▁▂▃▄▅▆▇█"
SHOWN = {
    *("form", "key_gauge", "value_gauge", "key_cache", "key_norm", "key_pairs", "row_align"),
    *("rank_k", "rank_v", "width_k", "width_v"),
}
"""Fields of layers that have a place in the tables, or are of no use to a reader."""
POINTS = 24  # of a healing curve


def show_inspection(found: Inspection) -> None:
    """Everything that is known, the cache first."""
    made_of = f"converted from {found.source}" if found.source else "without a record of its making"
    console.print(f"{found.directory}: {found.model_type}, {made_of}", soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in ("source", "converted", "kept"):
        table.add_column(column, justify="right")
    layers = len(found.layers)
    for name, before, after in (
        (f"cache bytes per token ({found.dtype})", found.source_kv_bytes, found.kv_bytes),
        ("  of them per layer", found.source_kv_bytes / layers, found.kv_bytes / layers),
    ):
        table.add_row(name, f"{before:,.6g}", f"{after:,.6g}", f"{after / before:.1%}")
    console.print(table)
    show_layers(found.shapes)
    for line in (*_further(found.layers), *_files(found), *_making(found)):
        console.print(line, soft_wrap=True, markup=False)
    if found.evaluation is not None:
        console.print("measured:")
        console.print(found.evaluation)


def sparkline(values: Sequence[float]) -> str:
    """The course of a curve in one line; `values` are its points."""
    if len(values) > POINTS:
        last = len(values) - 1
        values = [values[round(i * last / (POINTS - 1))] for i in range(POINTS)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def _further(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Fields of the layers that the table above does not have, whatever they are, where they are
    not the default: one line each, or one for each kind of layer."""
    for field in fields(LayerShape):
        if field.name in SHOWN:
            continue
        values = [layer.get(field.name, field.default) for layer in layers]
        kinds = list(dict.fromkeys(values))
        if kinds == [field.default]:
            continue
        name = field.name.replace("_", " ")
        for kind in kinds:
            where = [i for i, value in enumerate(values) if value == kind]
            plural = "" if len(where) == 1 else "s"
            of = "" if len(kinds) == 1 else f", layer{plural} {ranges(where)}"
            yield f"{name}{of}: {'yes' if kind is True else kind}"


def _files(found: Inspection) -> Iterator[str]:
    weights = found.weights
    plural = "" if weights.files == 1 else "s"
    yield (
        f"weights: {weights.parameters:,} parameters in {found.dtype}, {decimal(weights.size)} in "
        f"{weights.files} file{plural}"
    )


def _making(found: Inspection) -> Iterator[str]:
    if found.provenance is None:
        return
    record = found.provenance["convert"]
    versions = record.get("versions", {})
    known = ", ".join(
        f"{name} {versions[name]}" for name in ("tpa-convert", "transformers") if name in versions
    )
    chosen = {
        name: value
        for name, value in record["settings"].items()
        if value not in (None, [], False) and name not in ("seed", "text_column")
    }
    settings = " ".join(f"{name}={_short(value)}" for name, value in chosen.items())
    yield f"converted {record.get('date', '')} ({known}): {settings}"
    for step in found.healings:
        yield f"healed on {step.tokens:,} tokens{_course(step)}"


def _course(step: HealingStep) -> str:
    """The curve that says most of what is there: on held-out text, or the training loss."""
    if step.curve:
        source = step.source_perplexity
        against = f", source {source:.2f}" if source else ""
        return f": held-out perplexity {_curve(step.curve, '.2f')}{against}"
    if step.losses:
        return f": training loss {_curve(step.losses, '.3f')}"
    return ""


def _curve(points: Sequence[tuple[int, float]], form: str) -> str:
    values = [value for _, value in points]
    return f"{values[0]:{form}} {sparkline(values)} {values[-1]:{form}}"


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
