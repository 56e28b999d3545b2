"""Other ways to shrink a cache are what they are called; results are files that a page shows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.benchmarks import FOLDER, benchmark, record_rows, run_main, save_texts
from tests.command_line import save_source
from tests.conftest import make_tiny_llama
from tests.conversions import random_blocks, source_of

ROOT = FOLDER.parent


# ------------------------------------------------------------------------------- the comparison


def test_one_latent_holds_keys_and_values_together() -> None:
    baselines, statistics = benchmark("baselines"), benchmark("layer_statistics")
    source = source_of(make_tiny_llama("gqa", seed=4))
    [weights, *_] = statistics.layer_weights(source)
    [layer, *_] = statistics.collect(source, random_blocks()).layers
    full = baselines.joint_latent(weights, layer, 16, 16)
    torch.testing.assert_close(full.key, weights.key)
    torch.testing.assert_close(full.value, weights.value)
    narrow = baselines.joint_latent(weights, layer, 4, 4)
    rows = torch.cat((narrow.key.flatten(0, 1), narrow.value.flatten(0, 1)))
    assert torch.linalg.matrix_rank(rows) == 8


def test_the_comparison_measures_everything_at_its_bytes(tmp_path: Path, monkeypatch) -> None:
    rows = record_rows(monkeypatch)
    out = tmp_path / "comparison.json"
    options = ["--calibration-blocks", 2, "--refit-blocks", 2, "--shares", 50, "--json", out]
    run_main(
        "comparison", monkeypatch, save_source(tmp_path / "source"), *save_texts(tmp_path), *options
    )
    [source, *measured] = rows
    assert source.ratio == 1
    methods = {re.sub(r" [\d.]+ %$", "", row.name) for row in measured}
    assert methods == {
        "KIVI's kind",
        "TurboQuant's kind",
        "KVTC's kind",
        "low rank (Palu, CARE)",
        "one latent (MLA, TransMLA)",
        "fewer heads, aligned (GQA)",
        "TPA of the paper (linear)",
        "tpa-convert, 16 bits",
        "tpa-convert, no training",
        "tpa-convert, no training, refit",
    }
    for row in measured:
        share = float(row.name.split()[-2])
        assert row.floats == pytest.approx(share / 100 * 32, rel=1e-3)
    written = benchmark("results").load(out)
    assert [row[0] for row in written.rows] == [row.name for row in rows]
    assert written.columns[-4:-1] == ["ratio", "KL", "top-1, %"]
    assert [row[-4] for row in written.rows] == pytest.approx([r.ratio for r in rows], rel=1e-3)


# ------------------------------------------------------------------------------- results


def test_the_page_shows_the_files() -> None:
    results = benchmark("results")
    assert results.PAGE.read_text(encoding="utf-8") == results.page(), (
        "write it anew: python benchmarks/results.py"
    )
    [first, *_] = results.results().values()
    assert first.markdown() != replace(first, date="yesterday").markdown()


def test_rows_have_as_many_cells_as_the_table(tmp_path: Path) -> None:
    results = benchmark("results")
    result = results.of_this_run("Something", ["a", "b"], [["x", 1.23456], ["y", None]])
    results.save(result, tmp_path / "something.json")
    assert results.load(tmp_path / "something.json") == result
    assert "| x | 1.235 |\n| y |  |" in result.markdown()
    with pytest.raises(ValueError, match="Something: 1 cells for 2 columns"):
        replace(result, rows=[["x"]])


def figures_of(text: str) -> set[str]:
    """Ratios to a source, as ×1.034."""
    return set(re.findall(r"×(\d\.\d+)", text))


def unknown(text: str) -> set[str]:
    """Figures of a text that no file of results holds, rounded as the text has them."""
    cells = [
        cell
        for result in benchmark("results").results().values()
        for row in result.rows
        for cell in row
        if isinstance(cell, float)
    ]
    return {
        figure
        for figure in figures_of(text)
        if not any(abs(cell - float(figure)) < 0.5001 * 10 ** (2 - len(figure)) for cell in cells)
    }


@pytest.mark.parametrize("page", ["README.md"])
def test_every_ratio_of_a_page_is_in_a_file_of_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(figures_of(text)) > 8
    assert not unknown(text)
    assert unknown("×1.2345") == {"1.2345"}


def test_the_picture_shows_ours_below_what_is_quantised() -> None:
    """From the files; where the bytes are the same."""
    curves = {name: dict(points) for name, points in benchmark("picture").curves().items()}
    *quantised, plain, healed = curves.values()
    assert all(len(points) > 2 for points in curves.values())
    for share, kl in plain.items():
        assert healed[share] <= kl
        assert all(kl < other.get(share, kl + 1) for other in quantised)
    assert set(plain) & set().union(*quantised)


def test_files_of_results_say_how_to_repeat_them() -> None:
    for path in (FOLDER / "results").glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", found["date"]), path
        assert found["hardware"], path
        assert found["command"].startswith(("python benchmarks/", "tpa-convert ", "make ")), path
