"""The pictures of README and docs/choosing.md from results/*.json: `python benchmarks/picture.py`
writes docs/pareto.png and docs/choosing.png."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

from common.results import Cell, results

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = {"default": 1, "2 blocks": 2, "4 blocks": 4, "32 blocks": 32}  # of rotary pairs, by row


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


def increases() -> dict[str, list[tuple[float, float]]]:
    """Share of the bytes and increase of the perplexity, percent both, by what was done."""
    found: dict[str, list[tuple[float, float]]] = {"no training": [], "with --refit": []}
    for row in rows("coded_smollm2"):
        if row["run"] == "default":
            for name, column in zip(found, ("ratio", "ratio, refit"), strict=True):
                found[name].append((number(row["bytes, %"]), 100 * (number(row[column]) - 1)))
    best: dict[float, float] = {}
    for row in rows("healed_smollm2"):
        share, increase = number(row["bytes, %"]), 100 * (number(row["ratio"]) - 1)
        best[share] = min(increase, best.get(share, increase))
    return found | {"healed": sorted(best.items(), reverse=True)}


def losses_by_blocks() -> list[tuple[int, float]]:
    """Blocks of rotary pairs and KL at an eighth of the bytes, without training."""
    return [
        (BLOCKS[str(row["run"])], number(row["KL"]))
        for row in rows("coded_smollm2")
        if row["run"] in BLOCKS and row["bytes, %"] == 12.5
    ]


def number(cell: Cell) -> float:
    if not isinstance(cell, int | float):
        raise TypeError(f"{cell!r} is no number")
    return float(cell)


def main() -> None:
    matplotlib.use("Agg")
    draw_curves()
    draw_choices()


def draw_choices() -> None:
    """What a budget and what blocks of keys cost."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    found = increases()
    shares = [share for share, _ in found["no training"]]
    for i, (name, points) in enumerate(found.items()):
        places = [shares.index(share) + 0.27 * (i - 1) for share, _ in points]
        bars = left.bar(
            places,
            [y for _, y in points],
            0.25,
            label=name,
            color=("#c0392b", "#7fb3d5", "#1f618d")[i],
        )
        left.bar_label(bars, fmt="%.2g", fontsize=7)
    left.set_xticks(range(len(shares)), [f"{share:g} %" for share in shares])
    left.set_yscale("log")
    left.set_ylim(0.05, 90)
    left.set_xlabel("bytes of the cache that are kept")
    left.set_title("perplexity, percent above the source's", fontsize=9)
    left.legend(frameon=False, fontsize=8, loc="upper left")
    blocks = losses_by_blocks()
    bars = right.bar([str(count) for count, _ in blocks], [kl for _, kl in blocks], color="#7fb3d5")
    right.bar_label(bars, fmt="%.3f", fontsize=7)
    right.set_xlabel("blocks of rotary pairs (--key-blocks)")
    right.set_title("KL at 12.5 %, no training, nats a token", fontsize=9)
    for axes in (left, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(DOCS / "choosing.png", dpi=130, metadata={"Software": None})


def draw_curves() -> None:
    """The front in bytes."""
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
    figure.savefig(DOCS / "pareto.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
