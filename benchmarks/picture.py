"""The picture of the README from results/*.json: `python benchmarks/picture.py` writes
docs/pareto.png."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from results import Cell, results

PICTURE = Path(__file__).parents[1] / "docs" / "pareto.png"


def rows(name: str) -> list[Mapping[str, Cell]]:
    """The rows of a file of results, by their columns."""
    result = results()[name]
    return [dict(zip(result.columns, row, strict=True)) for row in result.rows]


def curves() -> dict[str, list[tuple[float, float]]]:
    """Share of the bytes in percent and KL, by what the model is."""

    def points(found: list[Mapping[str, Cell]], *columns: str) -> list[tuple[float, float]]:
        best: dict[Cell, float] = {}
        for row in found:
            for cell in map(row.get, columns):
                if isinstance(cell, float):
                    best[row["bytes, %"]] = min(cell, best.get(row["bytes, %"], cell))
        return sorted((float(share or 0), kl) for share, kl in best.items())

    quantised = rows("quantised_smollm2")
    return {
        "source's cache quantised, TurboQuant's kind": points(
            [row for row in quantised if "TurboQuant" in str(row["cache"])], "KL"
        ),
        "source's cache quantised, KIVI's kind": points(
            [row for row in quantised if "KIVI" in str(row["cache"])], "KL"
        ),
        "tpa-convert, no training": points(
            [row for row in rows("coded_smollm2") if row["run"] == "default"], "KL", "KL, refit"
        ),
        "tpa-convert, healed": points(rows("healed_smollm2"), "KL"),
    }


def main() -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4))
    colours = ("#8c6d9e", "#c0392b", "#7fb3d5", "#1f618d")
    for (name, found), colour in zip(curves().items(), colours, strict=True):
        axes.plot(*zip(*found, strict=True), "o-", label=name, color=colour)
    axes.set_yscale("log")
    axes.set_xlim(0, 34)
    axes.set_ylim(0.002, 12)
    axes.set_xlabel("bytes of the cache, % of 16 bits a number")
    axes.set_ylabel("KL from the source, nats a token")
    axes.set_title("SmolLM2-135M-Instruct on held-out text: lower and further left is better")
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
