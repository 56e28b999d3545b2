"""Pictures for a page: SVG in the colours of a light and of a dark screen."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator

from tpa_convert.evaluation import EvaluationReport
from tpa_convert.evaluation.sweep import SpeedPoint, SpeedReport
from tpa_convert.export.inspection import HealingStep, Inspection
from tpa_convert.reporting.charts import COLORS, pyplot

Draw = Callable[[Any], None]
"""Draws on the axes that it is given."""

INK = {"light": "#1d2433", "dark": "#dde3ee"}
SIZE = (6.4, 3.4)
FONT_SIZE = 12  # so that it can be read on a phone, where a picture is half as wide
LINES = ("-", "--", "-.", ":")  # of batches
FRONT = ("bytes per token", "perplexity")


def pictures(draw: Draw) -> dict[str, str]:
    """The picture as an address that holds all of it, for `light` and `dark` screens."""
    return {theme: _svg(draw, ink) for theme, ink in INK.items()}


def layer_bytes(found: Inspection) -> Draw:
    """Bytes that each layer caches per token: keys above, values below."""

    def draw(axes: Any) -> None:
        layers = range(len(found.rows))
        axes.bar(layers, [key for key, _ in found.rows], color=COLORS["keys"], label="keys")
        axes.bar(
            layers, [-value for _, value in found.rows], color=COLORS["values"], label="values"
        )
        source = found.source_kv_bytes / len(found.rows) / 2
        for sign in (1, -1):
            axes.axhline(
                sign * source,
                color=COLORS["source"],
                linestyle="--",
                label="source" if sign > 0 else None,
            )
        axes.axhline(0, color=axes.xaxis.label.get_color(), linewidth=0.8)
        axes.yaxis.set_major_formatter(lambda y, _: f"{abs(y):g}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel("bytes per token")

    return draw


def layer_losses(found: Inspection) -> Draw | None:
    """What the codes of each layer are expected to cost; None if that is not known."""
    if not found.layer_nats:
        return None

    def draw(axes: Any) -> None:
        axes.bar(range(len(found.layer_nats)), found.layer_nats, color=COLORS["keys"])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel("nats per token")

    return draw


def layer_errors(found: Inspection) -> Draw | None:
    """Errors of the attention of each layer before and after refit or refinement; None without."""
    if not found.layer_errors:
        return None

    def draw(axes: Any) -> None:
        layers = range(len(found.layer_errors))
        for i, label in enumerate(("before", "after")):
            values = [errors[i] for errors in found.layer_errors]
            axes.plot(layers, values, "o-", color=COLORS[("source", "held-out")[i]], label=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel("relative squared error")

    return draw


def speed_curves(report: SpeedReport) -> dict[str, Draw]:
    """Decoding, prefill and memory of the cache against the context, by what a picture shows: a
    line for each model and batch."""

    def curve(value: Callable[[SpeedPoint], float], unit: str) -> Draw:
        def draw(axes: Any) -> None:
            batches = sorted({point.batch for point in report.points})
            for i, model in enumerate(report.weight_bytes):
                for j, batch in enumerate(batches):
                    points = [p for p in report.points if (p.model, p.batch) == (model, batch)]
                    axes.plot(
                        [point.context for point in points],
                        [value(point) for point in points],
                        marker="o",
                        color=f"C{i}",
                        linestyle=LINES[j % len(LINES)],
                        label=model if len(batches) == 1 else f"{model}, batch {batch}",
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            # What lies within a decade wants more ticks than its ends; labels of many would touch.
            low, high = axes.get_ylim()
            subs = (1, 2, 3, 5, 7) if high < 30 * low else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
            axes.set_xlabel("context, tokens")
            axes.set_ylabel(unit)

        return draw

    return {
        "Time of a decoding step. Lower is better.": curve(
            lambda point: point.latency * 1e3, "milliseconds"
        ),
        "Speed of reading the prompt. Higher is better.": curve(
            lambda point: point.prefill, "tokens per second"
        ),
        "Memory that the cache takes.": curve(lambda point: point.cache_bytes / 1e6, "megabytes"),
    }


def healing_curves(steps: Sequence[HealingStep]) -> Draw | None:
    """Divergence from the source against tokens, over all healings; None without a curve."""
    if not any(step.losses or step.divergences for step in steps):
        return None

    def draw(axes: Any) -> None:
        before = 0
        for i, step in enumerate(steps):
            first = "" if i else None  # named once
            for points, style, color, label in (
                (step.losses, "-", COLORS["training"], "training text (loss)"),
                (step.divergences, "o-", COLORS["held-out"], "held-out text (KL)"),
            ):
                if points:
                    tokens = [(before + count) / 1e6 for count, _ in points]
                    values = [value for _, value in points]
                    shown = label if first is None else "_nolegend_"
                    axes.plot(tokens, values, style, color=color, label=shown, linewidth=1.6)
            before += step.tokens
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}")
        axes.tick_params(axis="y", which="minor", labelsize=FONT_SIZE - 3)
        axes.set_xlabel("millions of tokens")
        axes.set_ylabel("nats per token")

    return draw


def front(reports: Sequence[EvaluationReport]) -> Draw | None:
    """Perplexity relative to the source against bytes, a point for each model that was measured;
    None where there are fewer than two."""
    points: dict[str, tuple[float, float]] = {}
    for report in reports:
        points |= _measured(report)
    if len(points) < 2:
        return None

    def draw(axes: Any) -> None:
        for i, (name, (size, ratio)) in enumerate(points.items()):
            axes.plot(size, ratio, "o", markersize=9, color=f"C{i}", label=name)
        axes.set_xlabel("cache, bytes per token")
        axes.set_ylabel("perplexity / source's")
        axes.set_xlim(left=0)
        axes.margins(y=0.3)

    return draw


def _measured(report: EvaluationReport) -> dict[str, tuple[float, float]]:
    """Bytes and geometric mean of the perplexity ratios of each model."""
    found = {}
    sizes = next((row for row in report.rows if row.name.startswith(FRONT[0])), None)
    texts = [row for row in report.rows if row.unit == FRONT[1]]
    if sizes is None or not texts:
        return {}
    for model in report.models:
        size = sizes.values[model]
        ratios = [ratio for row in texts if (ratio := row.ratio(model)) is not None]
        if size is not None and len(ratios) == len(texts):
            product = 1.0
            for ratio in ratios:
                product *= ratio
            found[model] = (size, product ** (1 / len(ratios)))
    return found


def _svg(draw: Draw, ink: str) -> str:
    plt = pyplot()
    look = {
        "font.size": FONT_SIZE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",  # letters stay letters: smaller, and in the reader's font
        "svg.hashsalt": "tpa-convert",  # the same picture every time
        **dict.fromkeys(
            (
                "text.color",
                "axes.edgecolor",
                "axes.labelcolor",
                "xtick.color",
                "ytick.color",
                "grid.color",
            ),
            ink,
        ),
    }
    with plt.rc_context(look):
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        draw(axes)
        axes.grid(alpha=0.2)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(
                frameon=False,
                fontsize=FONT_SIZE - 1,
                loc="lower center",
                bbox_to_anchor=(0.5, 1.0),
                ncols=3,
            )
        data = io.BytesIO()
        figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()
