"""Pictures of speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpa_convert.evaluation.sweep import SpeedReport
from tpa_convert.reporting.charts import pyplot, save_figure


def speed_chart(report: SpeedReport, path: Path) -> None:
    """Decoding steps and prefill against the context, a line for each model and batch; dotted, the
    floor of each step."""
    plt = pyplot()
    figure, (steps, prefill) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    batches = sorted({point.batch for point in report.points})
    styles = ("-", "--", "-.", (0, (1, 1)))
    for i, model in enumerate(report.weight_bytes):
        for j, batch in enumerate(batches):
            points = [p for p in report.points if (p.model, p.batch) == (model, batch)]
            contexts = [p.context for p in points]
            look: dict[str, Any] = {"color": f"C{i}", "linestyle": styles[j % len(styles)]}
            label = f"{model}, batch {batch}"
            steps.plot(contexts, [p.latency * 1e3 for p in points], marker="o", label=label, **look)
            floors = [p.floor * 1e3 for p in points]
            steps.plot(contexts, floors, ":", color=f"C{i}", linewidth=1)
            prefill.plot(contexts, [p.prefill for p in points], marker="o", label=label, **look)
    steps.set_ylabel("milliseconds a decoding step (dotted: weights and cache read once)")
    prefill.set_ylabel("prompt tokens a second")
    for axes in (steps, prefill):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("context, tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    steps.yaxis.label.set_fontsize(8)
    figure.suptitle(f"{report.device}, {report.dtype}", fontsize=10)
    save_figure(figure, path)
    plt.close(figure)
