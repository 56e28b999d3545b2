"""Pictures of results, for files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpa_convert.export.output import atomic_file
from tpa_convert.healing import HealingReport
from tpa_convert.planning.search import Candidate, PlanReport
from tpa_convert.plans import Plan

LEAST_KL, MOST_KL = 1e-4, 3.0  # that a chart of plans shows
LABELS = {
    "uniform": "uniform widths",
    "halfway": "halfway",
    "measured": "widths by sensitivity",
    "coded": "coded in bits",
}
MARKERS = {"affine": "s", "linear": "^"}
COLORS = {
    "uniform": "#7f7f7f",
    "halfway": "#17becf",
    "measured": "#1f77b4",
    "coded": "#1f77b4",
    "quantised": "#d62728",
    "keys": "#1f77b4",
    "values": "#ff7f0e",
    "training": "#7fb0dd",
    "held-out": "#1f77b4",
    "source": "#7f7f7f",
}


def planning_chart(report: PlanReport, path: Path, *, refined: bool) -> None:
    """Divergence from the source against cache bytes, and what the chosen plan caches by layer.

    Args:
        refined: whether candidates were refined before they were measured.
    """
    plt = pyplot()
    figure, (curve, layers) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _draw_candidates(curve, report)
    curve.set_xlabel("share of the source's cache at 16 bits a number")
    curve.xaxis.set_major_formatter(plt.FuncFormatter(lambda x, _: f"{x:.0%}"))
    curve.set_ylabel("KL divergence from the source, nats per token")
    moment = "After refinement, before" if refined else "Before refinement and"
    curve.set_title(f"{moment} healing (dotted: predicted)")
    curve.grid(alpha=0.3)
    curve.legend(fontsize=8, loc="best")
    _draw_layers(layers, report.plan)
    layers.yaxis.set_major_formatter(plt.FuncFormatter(lambda y, _: f"{abs(y):g}"))
    save_figure(figure, path)
    plt.close(figure)


def _draw_candidates(axes: Any, report: PlanReport) -> None:
    """Every kind of candidate as a line, the source's quantised caches, and the chosen one."""

    def share(candidate: Candidate) -> float:
        return candidate.plan.kv_bytes / candidate.plan.source_kv_bytes

    for split, label in LABELS.items():
        points = [c for c in report.candidates if c.form == "static" and c.split == split]
        if not points:
            continue
        x = [share(c) for c in points]
        axes.plot(x, [c.kl for c in points], "o-", color=COLORS[split], label=label)
        axes.plot(x, [c.predicted_kl for c in points], ":", color=COLORS[split], linewidth=1)
    for c in report.candidates:
        if c.form != "static":
            axes.plot(
                share(c), c.kl, MARKERS[c.form], color="#d62728", fillstyle="none", label=c.form
            )
    if report.quantised:
        others = report.quantised
        x = [other.share for other in others]
        label = "source, cache quantised"
        axes.plot(x, [o.kl for o in others], "s-", color=COLORS["quantised"], label=label)
        for other in others:
            place = (other.share, other.kl)
            axes.annotate(f"int{other.bits}", place, (4, 4), textcoords="offset points", fontsize=8)
    best = report.candidates[report.chosen]
    axes.plot(share(best), best.kl, "*", color="#2ca02c", markersize=16, label="chosen")
    axes.set_yscale("log")
    # Hardly anything and everything lost would squeeze what lies between.
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, LEAST_KL), min(high, MOST_KL))


def _draw_layers(axes: Any, plan: Plan) -> None:
    """What the keys of each layer cache upwards, and its values downwards."""
    coded = plan.is_coded
    for sign, name in ((1, "keys"), (-1, "values")):
        heights = []
        for shape in plan.layers:
            width = shape.width_k if name == "keys" else shape.width_v
            layout = shape.key_layout if name == "keys" else shape.value_layout
            heights.append(sign * (layout.row_bytes if coded else width))
        axes.bar(range(len(heights)), heights, color=COLORS[name], label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("layer")
    what = "bytes" if coded else "numbers"
    axes.set_ylabel(f"{what} cached per token")
    axes.set_title(f"Chosen {'bytes' if coded else 'widths'}: keys above, values below")
    axes.legend(fontsize=8)


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
