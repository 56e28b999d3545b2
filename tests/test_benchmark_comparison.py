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
from tpa_convert.calibration.cache_moments import collect_cache_moments

ROOT = FOLDER.parent


def other() -> object:
    return benchmark("other_caches")


# ------------------------------------------------------------------------------- rotations


def test_levels_are_those_of_least_error_for_a_normal_number() -> None:
    """Max, Quantizing for minimum distortion (1960), table I."""
    assert other().normal_levels(1).tolist() == pytest.approx([-0.7979, 0.7979], abs=1e-3)
    assert other().normal_levels(2).tolist() == pytest.approx(
        [-1.510, -0.4528, 0.4528, 1.510], abs=2e-3
    )


def test_rotations_spread_what_stands_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 64)
    x[:, 3] *= 30
    rounded = other().rotate_and_round(x, 2)
    error = (rounded - x).square().sum() / x.square().sum()
    assert error == pytest.approx(0.1175, rel=0.1)  # of a normal number in two bits
    turn = other().rotation(64)
    plain = other().rotate_and_round(x.double() @ turn.mT, 2) @ turn  # turned before, so not at all
    assert (plain - x).square().sum() / x.square().sum() > 3 * error
    finer = other().rotate_and_round(x, 8)
    assert (finer - x).square().sum() < error * x.square().sum() / 100


def test_the_rotated_source_attends_to_rounded_keys_and_values() -> None:
    model, tokens = make_tiny_llama("gqa"), random_blocks(count=2, length=24)
    exact = model(tokens).logits
    distances = [
        (other().rotated_source(model, bits)(tokens).logits - exact).norm().item()
        for bits in (2, 4, 8)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 10 * distances[-1] > 0
    assert torch.equal(model(tokens).logits, exact)


# ------------------------------------------------------------------------------- components


def test_principal_components_count_every_error_alike() -> None:
    source = source_of(make_tiny_llama("gqa", seed=4))
    moments = collect_cache_moments(source, random_blocks())
    [layer, *_] = moments.layers
    found = other().principal(layer)
    for metric, part in zip(
        (found.key_metric, found.value_metric), layer.covariance.diagonal().chunk(2), strict=True
    ):
        assert torch.equal(metric, torch.eye(len(part)).double() * metric[0, 0])
        assert (metric.diagonal() * part).sum() == pytest.approx(1)
    model, floats = other().principal_source(source, moments, 0.5)
    assert sum(model.config.cached_bytes) / 2 == pytest.approx(floats * len(moments.layers))
    assert not any(shape.predict_values for shape in model.config.layer_shapes)


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


# ------------------------------------------------------------------------------- the comparison


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


def test_files_of_results_say_how_to_repeat_them() -> None:
    for path in (FOLDER / "results").glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", found["date"]), path
        assert found["hardware"], path
        assert found["command"].startswith(("python benchmarks/", "tpa-convert ")), path
