"""Other ways to shrink a cache are what they are called; results are files that a page shows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM

from tests.benchmarks import FOLDER, benchmark, figures, run_main, save_texts
from tests.command_line import save_source
from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.conversions import random_blocks, source_of
from tests.tiny_models import CONFIGS, MODELS, random_model
from tpa_convert.forward.cached import cache_argument, cache_of
from tpa_convert.forward.comparison import BlockScores, agreement

ROOT = FOLDER.parent


# ------------------------------------------------------------------------------- the comparison


def test_one_latent_holds_keys_and_values_together() -> None:
    baselines, statistics = benchmark("common.baselines"), benchmark("common.layer_statistics")
    source = source_of(make_tiny_llama("gqa", seed=4))
    [weights, *_] = statistics.layer_weights(source)
    [layer, *_] = statistics.collect(source, random_blocks()).layers
    full = baselines.joint_latent(weights, layer, 16, 16)
    torch.testing.assert_close(full.key, weights.key)
    torch.testing.assert_close(full.value, weights.value)
    narrow = baselines.joint_latent(weights, layer, 4, 4)
    rows = torch.cat((narrow.key.flatten(0, 1), narrow.value.flatten(0, 1)))
    assert torch.linalg.matrix_rank(rows) == 8


METHODS = {
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
SIMULATED = ("TurboQuant", "KVTC", "low rank", "one latent", "fewer heads")
SMALL = ["--calibration-blocks", 2, "--refit-blocks", 2, "--length", 256]


def save_questions(path: Path) -> Path:
    """Questions about the text that the others train and measure on."""
    questions = [
        {"query": f"A line of text number {i}", "choices": ["to train", "as one does"], "gold": 0}
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


def test_the_comparison_measures_everything_at_its_bytes(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "comparison.json"
    tasks = save_questions(tmp_path / "lines.jsonl")
    options = ["--shares", 50, "--other-sources", "long", "--tasks", tasks, "--task-limit", 6]
    options += ["--needles", 100, "--needles-per-depth", 1, "--needles-for", "KVTC", "--json", out]
    options += ["--speed", 2, "--speed-context", 16]
    path = save_source(tmp_path / "source")
    run_main("comparison", monkeypatch, path, *save_texts(tmp_path), *SMALL, *options)
    written = benchmark("common.results").load(out)
    rows = [dict(zip(written.columns, row, strict=True)) for row in written.rows]
    [first, *measured] = rows
    assert {key: value for key, value in first.items() if "ratio" in key or "KL" in key} == {
        "ratio, training kinds": 1,
        "KL, training kinds": 0,
        "ratio, other kinds": 1,
        "KL, other kinds": 0,
    }
    assert (first["points lost"], first["±"]) == (0, 0)
    assert {re.sub(r" [\d.]+ %$", "", row[""]) for row in measured} == METHODS
    for row in measured:
        assert row["bytes, %"] == pytest.approx(float(row[""].split()[-2]), rel=1e-3)
        assert (row["needles at 100, %"] is None) == ("KVTC" not in row[""])
        speed = row["decoding at batch 2, × source"]
        assert (speed == "simulated") == row[""].startswith(SIMULATED), row[""]
        assert speed == "simulated" or speed > 0

    blocks, source = benchmark("common.blocks"), benchmark("common.models").load(str(path))
    row = next(row for row in measured if "(linear)" in row[""])
    comparison = benchmark("comparison").Comparison(
        source, blocks.train_blocks(str(tmp_path / "train.jsonl"), source, 512, 2), None
    )
    model, _ = comparison.plain(16, form="linear")
    texts = blocks.valid_blocks(str(tmp_path / "valid.jsonl"), source, 256, 1)
    [title, long] = (
        figures(model, source.model, {name: texts[name]}) for name in ("titles", "long")
    )
    assert row["KL, training kinds"] == pytest.approx(title.kl, rel=1e-3)
    assert row["top-1 %, training kinds"] == pytest.approx(100 * title.top1, rel=1e-3)
    questions = benchmark("comparison").load_questions(tasks, 6)
    ids, counted = benchmark("common.quality").question_text(source.tokenizer, questions)
    alone = [
        figures(model, source.model, {"": block[None, :size]}).kl
        for block, size in zip(ids, counted.sum(1), strict=True)
    ]
    assert len({int(size) for size in counted.sum(1)}) == 1
    assert row["KL, other kinds"] == pytest.approx((long.kl + sum(alone) / 6) / 2, rel=1e-3)


def test_a_source_decodes_with_a_cache_that_is_quantised() -> None:
    """Its own, whatever is asked of the source itself."""
    pytest.importorskip("hqq")
    decoding, source = benchmark("common.decoding"), make_tiny_llama("gqa")
    other = decoding.with_quantised_cache(source, 2)
    tokens = random_blocks(count=1, length=32)
    with torch.no_grad():
        outputs = [model(tokens, use_cache=True) for model in (source, other)]
        following = [
            model(tokens[:, :1], use_cache=True, **cache_argument(output)).logits
            for model, output in zip((source, other), outputs, strict=True)
        ]
    caches = [cache_of(output) for output in outputs]
    assert [cache.get_seq_length() for cache in caches] == [33, 33]
    assert [type(cache).__name__ for cache in caches] == ["DynamicCache", "QuantizedCache"]
    assert other.lm_head.weight is source.lm_head.weight
    assert (following[0] - following[1]).abs().max() > 1e-2


def test_the_comparison_says_what_cannot_be_done(tmp_path: Path, monkeypatch) -> None:
    """On a Gemma 3 of one head for keys and values, with windows and norms on keys."""
    config = CONFIGS["gemma3"]()
    config.update({"num_key_value_heads": 1})
    model = random_model(Gemma3ForCausalLM, config)
    model.save_pretrained(tmp_path / "source")
    make_tiny_tokenizer().save_pretrained(tmp_path / "source")
    out = tmp_path / "comparison.json"
    options = ["--shares", 50, "--json", out]
    path = tmp_path / "source"
    run_main("comparison", monkeypatch, path, *save_texts(tmp_path), *SMALL, *options)
    [_, *rows] = benchmark("common.results").load(out).rows
    missing = {row[0] for row in rows if row[1] is None}
    assert {re.sub(r" [\d.]+ %.*", "", row[0]) for row in rows} == METHODS
    assert {name.split(":")[0] for name in missing} == {
        "fewer heads, aligned (GQA) 50 %",
    }
    assert all(": not on this model (" in name for name in missing)
    paired = benchmark("common.results").load(tmp_path / "comparison_paired.json")
    assert {row[0] for row in paired.rows} == {
        row[0] for row in rows if row[1] and row[1] > 49 and "no training" not in row[0]
    }


def test_low_rank_keys_of_full_width_are_those_of_a_model_with_norms() -> None:
    source = source_of(MODELS["gemma3"]())
    blocks = random_blocks()
    comparison = benchmark("comparison").Comparison(source, blocks, blocks)
    model, _ = comparison.low(benchmark("common.baselines").whitened_joint_svd, 32)
    assert agreement(source.model, model, blocks).kl < 1e-6
    narrow, _ = comparison.low(benchmark("common.baselines").whitened_joint_svd, 8)
    assert agreement(source.model, narrow, blocks).kl > 1e-3


# ------------------------------------------------------------------------------- pairs


def scores_of(nll: list[float], kl: list[float], tokens: list[int]) -> BlockScores:
    same = torch.zeros(len(nll), dtype=torch.double)
    return BlockScores(torch.tensor(nll).double(), torch.tensor(kl).double(), same,
                       torch.tensor(tokens))  # fmt: skip


def test_a_difference_is_paired_and_weighs_texts_alike() -> None:
    paired = benchmark("common.paired")
    ours = {"a": scores_of([10, 90], [1, 2], [10, 10]), "b": scores_of([50, 50], [0, 0], [50, 50])}
    other = {"a": scores_of([12, 92], [2, 3], [10, 10]), "b": scores_of([51, 49], [1, 3], [50, 50])}
    found = paired.difference(ours, other, "nll")
    assert found.mean == pytest.approx((4 / 20 + 0) / 2)
    # a differs by the same in both blocks, b by 1 and -1: deviations of 1 in 100 tokens
    assert found.margin == pytest.approx(1.96 * (2 * 2 / 100**2) ** 0.5 / 2, rel=1e-4)
    assert found.verdict == "first"
    assert paired.difference(other, ours, "nll").verdict == "behind"
    wider = {"a": ours["a"], "b": scores_of([70, 30], [1, 3], [50, 50])}
    assert paired.difference(ours, wider, "nll").verdict == "tied"
    assert paired.difference(ours, ours, "kl").verdict == "tied"
    alone = {"a": scores_of([10], [1], [10])}
    assert paired.difference(alone, {"a": scores_of([99], [1], [10])}, "nll").verdict == "tied"


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Blocks of very different lengths, two texts."""
    paired = benchmark("common.paired")
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        ours, other = {}, {}
        for name in ("a", "b"):
            tokens = torch.randint(5, 100, (60,), generator=generator)
            noise = torch.randn(60, generator=generator) * tokens.sqrt() + 3
            zero = torch.zeros(60, dtype=torch.double)
            ours[name] = BlockScores(zero, zero, zero, tokens)
            other[name] = BlockScores(zero + 0.1 * tokens + noise - 3, zero, zero, tokens)
        found = paired.difference(ours, other, "nll")
        hits += abs(found.mean - 0.1) < found.margin
    assert 0.92 < hits / 400 < 0.98


def test_ours_is_the_row_of_no_more_bytes() -> None:
    comparison = benchmark("comparison")

    def row(method: str, share: float, kl: float):
        scores = {"training kinds": {"text": scores_of([0], [kl], [1])}}
        return comparison.Row(method, share, scores, {}, {}, (), (0, 0))

    rows = [row(comparison.OURS, share, kl) for share, kl in ((50, 0.1), (25, 0.3), (12.5, 0.5))]
    rows += [row(f"{comparison.OURS}, refit", 24.99, 0.2), row(comparison.HEALED, 25.0, 0.0)]
    assert comparison.beside(rows, comparison.OURS, 31.25) is rows[3]
    assert comparison.beside(rows, comparison.OURS, 24.9) is rows[3]
    assert comparison.beside(rows, comparison.OURS, 18.75) is rows[2]
    assert comparison.beside(rows, comparison.OURS, 6.25) is None
    assert comparison.beside(rows, comparison.HEALED, 25.0) is rows[4]


# ------------------------------------------------------------------------------- results


def test_the_page_shows_the_files() -> None:
    script, results = benchmark("results"), benchmark("common.results")
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), (
        "write it anew: python benchmarks/results.py"
    )
    [first, *_] = results.results().values()
    assert first.markdown() != replace(first, date="yesterday").markdown()


def test_rows_have_as_many_cells_as_the_table(tmp_path: Path) -> None:
    results = benchmark("common.results")
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
        for result in benchmark("common.results").results().values()
        for row in result.rows
        for cell in row
        if isinstance(cell, float)
    ]
    return {
        figure
        for figure in figures_of(text)
        if not any(abs(cell - float(figure)) < 0.5001 * 10 ** (2 - len(figure)) for cell in cells)
    }


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md", "docs/faq.md"])
def test_every_ratio_of_a_page_is_in_a_file_of_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(figures_of(text)) > 6
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


def test_the_picture_of_choices_has_what_the_files_have() -> None:
    picture = benchmark("picture")
    found = picture.increases()
    assert [share for share, _ in found["healed"]] == [share for share, _ in found["no training"]]
    assert all(y < x for (_, x), (_, y) in zip(found["no training"], found["healed"], strict=True))
    blocks = picture.losses_by_blocks()
    assert blocks == sorted(blocks)
    assert len(blocks) > 3


def test_links_between_pages_lead_somewhere() -> None:
    pages = [page for folder in (".", "docs") for page in (ROOT / folder).glob("*.md")]
    links = [
        (page, link)
        for page in [*pages, *FOLDER.rglob("*.md")]
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    assert len(links) > 50
    assert [(page, link) for page, link in links if not (page.parent / link).exists()] == []
