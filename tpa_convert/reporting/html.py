"""One page that shows what is known of a converted model, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.filesize import decimal

from tpa_convert.evaluation import EvaluationReport
from tpa_convert.evaluation.sweep import SpeedReport
from tpa_convert.export.card import (
    making,
    own_column,
    quality,
    recipe_of,
    without_folders,
)
from tpa_convert.export.inspection import Inspection
from tpa_convert.modeling import LayerShape
from tpa_convert.reporting.figures import (
    front,
    healing_curves,
    layer_bytes,
    layer_errors,
    layer_losses,
    pictures,
    speed_curves,
)

TEMPLATE = Path(__file__).with_name("report_template.html")
CONTEXTS = (1024, 8192, 32_768, 131_072)
DROPPED = "drop"  # in the name of the row that sums up how much worse tasks are answered


def render_report(
    found: Inspection,
    reports: Sequence[EvaluationReport] = (),
    speeds: Sequence[SpeedReport] = (),
) -> str:
    """The page of a model.

    Args:
        reports: what was measured of it, beside what its own record has.
        speeds: how fast it was beside its source.
    """
    own = [] if found.evaluation is None else [found.evaluation]
    reports = [*reports, *(report for report in own if report not in reports)]
    provenance = found.provenance
    curves, measured = healing_curves(found.healings), front(reports)
    losses, errors = layer_losses(found), layer_errors(found)
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    header, rows = _layers(found)
    return template.render(
        found=found,
        source=without_folders(provenance["source"]["id"]) if provenance else None,
        tiles=list(_tiles(found, reports)),
        quality=quality(provenance or {}, found.name, reports[0] if reports else None),
        front=pictures(measured) if measured else None,
        layers=pictures(layer_bytes(found)),
        losses=pictures(losses) if losses else None,
        errors=pictures(errors) if errors else None,
        speeds=[_speed(report) for report in speeds],
        memory=[_memory(found, tokens) for tokens in CONTEXTS],
        layer_header=header,
        layer_rows=rows,
        making=making(provenance) if provenance else [],
        healing=pictures(curves) if curves else None,
        reports=reports,
        recipe=recipe_of(provenance) if provenance else None,
        versions=_versions(provenance["convert"]) if provenance else None,
    )


def _tiles(found: Inspection, reports: Sequence[EvaluationReport]) -> Iterator[dict[str, str]]:
    """The figures that matter most, as far as they are known."""
    yield {
        "value": f"{found.kv_bytes / found.source_kv_bytes:.1%}",
        "meaning": f"of the source's cache: {found.kv_bytes:,} bytes per token instead of "
        f"{found.source_kv_bytes:,}",
    }
    column = own_column(reports[0], found.provenance or {}, found.name) if reports else None
    if column is not None:
        yield from _measured_tiles(reports[0], column)
    elif found.healings and found.healings[-1].curve and found.healings[-1].source_perplexity:
        step = found.healings[-1]
        ratio = step.curve[-1][1] / (step.source_perplexity or 1.0)
        yield {"value": f"×{ratio:.3f}", "meaning": "perplexity on held-out text, healed"}
    if found.healings:
        tokens = sum(step.tokens for step in found.healings)
        shown = f"{tokens / 1e6:,.3g} M" if tokens >= 1e6 else f"{tokens:,}"
        yield {"value": shown, "meaning": "tokens it was healed on"}
    yield {
        "value": f"{found.weights.parameters / 1e6:,.4g} M",
        "meaning": f"parameters in {found.dtype}, {decimal(found.weights.size)}",
    }


def _measured_tiles(report: EvaluationReport, model: str) -> Iterator[dict[str, str]]:
    ratios = [
        (row.name, ratio)
        for row in report.rows
        if row.unit == "perplexity" and (ratio := row.ratio(model)) is not None
    ]
    if ratios:
        name, worst = max(ratios, key=lambda pair: pair[1])
        among = "" if len(ratios) == 1 else f", the worst of {len(ratios)} texts"
        yield {"value": f"×{worst:.3f}", "meaning": f"perplexity on {name}{among}"}
    for row in report.rows:
        value = row.values[model]
        if DROPPED in row.name and value is not None:
            margin = f" ± {row.margins[model]:.1f}" if model in row.margins else ""
            yield {"value": f"{value:.1f}{margin}", "meaning": f"points: {row.name}"}


def _speed(report: SpeedReport) -> dict[str, Any]:
    """Pictures by their captions, and what was measured on."""
    caches = "static caches" if report.static else "dynamic caches"
    return {
        "pictures": {text: pictures(draw) for text, draw in speed_curves(report).items()},
        "where": f"{report.device}, {report.dtype}, {caches}.",
    }


def _memory(found: Inspection, tokens: int) -> dict[str, str]:
    return {
        "tokens": f"{tokens:,}",
        "source": decimal(tokens * found.source_kv_bytes),
        "own": decimal(tokens * found.kv_bytes),
    }


def _layers(found: Inspection) -> tuple[list[str], list[list[str]]]:
    """Fields of the layers that say something, and the bytes of each layer."""
    names = [
        field.name
        for field in fields(LayerShape)
        if any(layer.get(field.name) not in (None, False) for layer in found.layers)
    ]
    header = ["layer", "key bytes", "value bytes", *(name.replace("_", " ") for name in names)]
    rows = [
        [str(i), f"{key:,}", f"{value:,}", *(str(layer.get(name, "")) for name in names)]
        for i, (layer, (key, value)) in enumerate(zip(found.layers, found.rows, strict=True))
    ]
    return header, rows


def _versions(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
