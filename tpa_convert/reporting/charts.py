"""Pictures of results, for files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpa_convert.errors import UserError
from tpa_convert.export.output import atomic_file
from tpa_convert.healing import HealingReport
from tpa_convert.planning.search import PlanReport

FORMATS = (".png", ".svg", ".pdf")
LABELS = {
    "uniform": "uniform widths",
    "halfway": "halfway",
    "measured": "widths by sensitivity",
}
MARKERS = {"affine": "s", "linear": "^"}
COLORS = {
    "uniform": "#7f7f7f",
    "halfway": "#17becf",
    "measured": "#1f77b4",
    "keys": "#1f77b4",
    "values": "#ff7f0e",
    "training": "#aec7e8",
    "held-out": "#1f77b4",
    "source": "#7f7f7f",
}


def check_chart(path: Path) -> None:
    """Refuses a file that could not be drawn, before any work is done.

    Raises:
        UserError: an unknown ending.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"a chart ends in {', '.join(FORMATS)}, not {path.name}")


def planning_chart(report: PlanReport, path: Path, *, refined: bool) -> None:
    """Perplexity against cache bytes, and the chosen widths by layer.

    Args:
        refined: whether candidates were refined before they were measured.
    """
    plt = pyplot()
    figure, (curve, widths) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    for split, label in LABELS.items():
        points = [c for c in report.candidates if c.form == "static" and c.split == split]
        kilobytes = [c.plan.kv_bytes / 1e3 for c in points]
        curve.plot(
            kilobytes, [c.perplexity_ratio for c in points], "o-", color=COLORS[split], label=label
        )
        predicted = [_ratio(c.predicted_kl) for c in points]
        curve.plot(kilobytes, predicted, ":", color=COLORS[split], linewidth=1)
    for c in report.candidates:
        if c.form != "static":
            x = c.plan.kv_bytes / 1e3
            marker = MARKERS[c.form]
            curve.plot(
                x, c.perplexity_ratio, marker, color="#d62728", fillstyle="none", label=c.form
            )
    best = report.candidates[report.chosen]
    curve.plot(
        best.plan.kv_bytes / 1e3,
        best.perplexity_ratio,
        "*",
        color="#2ca02c",
        markersize=16,
        label="chosen",
    )
    curve.set_yscale("log")
    curve.set_xlabel("cache, kB per token")
    curve.set_ylabel("perplexity relative to the source")
    curve.yaxis.set_major_formatter(plt.FuncFormatter(lambda y, _: f"×{y:g}"))
    curve.yaxis.set_minor_formatter(plt.FuncFormatter(lambda y, _: f"×{y:g}"))
    curve.tick_params(axis="y", which="minor", labelsize=7)
    moment = "After refinement, before" if refined else "Before refinement and"
    curve.set_title(f"{moment} healing (dotted: predicted)")
    curve.grid(alpha=0.3)
    curve.legend(fontsize=8, loc="best")

    layers = range(len(best.plan.layers))
    for sign, name in ((1, "keys"), (-1, "values")):
        heights = [
            sign * (shape.width_k if name == "keys" else shape.width_v)
            for shape in best.plan.layers
        ]
        widths.bar(layers, heights, color=COLORS[name], label=name)
    widths.axhline(0, color="black", linewidth=0.8)
    widths.yaxis.set_major_formatter(plt.FuncFormatter(lambda y, _: f"{abs(y):g}"))
    widths.set_xlabel("layer")
    widths.set_ylabel("numbers cached per token")
    widths.set_title("Chosen widths: keys above, values below")
    widths.legend(fontsize=8)
    save_figure(figure, path)
    plt.close(figure)


def healing_chart(report: HealingReport, tokens_per_step: int, path: Path) -> None:
    """What healing did, against tokens seen: perplexity on the held-out text beside the source's
    (if there was some), and the divergence from the source."""
    plt = pyplot()
    measured = report.source_perplexity is not None
    unit, name = (1e6, "millions") if report.steps * tokens_per_step >= 1e6 else (1e3, "thousands")
    figure, panels = plt.subplots(
        1, 1 + measured, figsize=(11 if measured else 7, 4.2), layout="constrained", squeeze=False
    )

    def draw(axes: Any, points: Sequence[tuple[int, float]], style: str, **look: Any) -> None:
        tokens = [step * tokens_per_step / unit for step, _ in points]
        axes.plot(tokens, [value for _, value in points], style, linewidth=1.4, **look)

    losses = panels[0, -1]
    draw(losses, report.losses, "-", color=COLORS["training"], label="training text (loss)")
    if report.valid_losses:
        draw(
            losses, report.valid_losses, "o-", color=COLORS["held-out"], label="held-out text (KL)"
        )
    losses.set_title("Divergence from the source")
    losses.set_ylabel("nats per token")
    if report.source_perplexity is not None:
        curve, source = panels[0, 0], report.source_perplexity
        first, last = (report.valid_perplexities[end][1] for end in (0, -1))
        label = f"healed model, {first:.2f} → {last:.2f} (×{last / source:.3f})"
        draw(curve, report.valid_perplexities, "o-", color=COLORS["held-out"], label=label)
        look = {"color": COLORS["source"], "linestyle": "--"}
        curve.axhline(source, label=f"source, {source:.2f}", **look)
        curve.set_title("Perplexity on held-out text")
        curve.set_ylabel("perplexity")
    for axes in panels[0]:
        axes.set_yscale("log")
        axes.margins(y=0.15)  # room for the legend above the curves
        axes.legend(fontsize=9, loc="upper right")
        low, high = axes.get_ylim()
        ticks = (1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        axes.yaxis.set_major_locator(plt.LogLocator(subs=ticks))
        axes.yaxis.set_major_formatter(plt.FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(plt.NullFormatter())
        axes.set_xlabel(f"tokens, {name}")
        axes.grid(alpha=0.3)
    save_figure(figure, path)
    plt.close(figure)


def _ratio(kl: float | None) -> float:
    return math.nan if kl is None else math.exp(kl)


def save_figure(figure: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())


def pyplot() -> Any:
    """matplotlib without a screen."""
    # Imported here: it takes a second, and most commands draw nothing.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
