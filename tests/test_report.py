"""The page of a model: whole in one file, and with what is known, whatever that is."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import error_of, save_source, save_text, tpa_convert
from tpa_convert.evaluation import EvaluationReport
from tpa_convert.evaluation.report import Row
from tpa_convert.evaluation.sweep import SpeedPoint, SpeedReport
from tpa_convert.export.card import making, own_column, quality
from tpa_convert.export.inspection import inspect
from tpa_convert.pipeline.healing import KEPT_POINTS, thinned
from tpa_convert.reporting.figures import front, healing_curves, pictures
from tpa_convert.reporting.html import render_report

LEGACY = Path(__file__).parent / "legacy" / "llama-latent"


class Page(HTMLParser):
    """What a browser would load, show and leave open."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.addresses += [v for k, v in attributes if k in ("src", "srcset", "href") and v]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.shown += data

    @property
    def words(self) -> str:
        return " ".join(self.shown.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a recipe with all steps leaves."""
    folder = tmp_path_factory.mktemp("run")
    save_source(folder / "source")
    train, test = save_text(folder / "train.txt"), folder / "test.txt"
    test.write_text("Another text <b>altogether</b>, to hold out. " * 200)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"source: {folder / 'source'}\n"
        "convert: {kv_ratio: 0.5, cache_bits: 16, calibration_blocks: 2, block_length: 32}\n"
        f"heal: {{text: {train}, tokens: 128, tokens_per_step: 64, block_length: 32}}\n"
        f"evaluate: {{text: {test}, block_length: 32, max_blocks: 4, speed: false,"
        " prompt: 'a <i> b'}\n"
        f"out: {folder / 'out'}\n"
    )
    result = tpa_convert("run", recipe)
    assert result.exit_code == 0, result.output
    return folder / "out"


def test_a_run_ends_with_a_page(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"(https?:)?//(?!www\.w3\.org)[a-z]+\.", text)
    report = json.loads((run / "report.json").read_text())
    measured = report["rows"][0]["values"]
    ratio = measured["healed"] / measured["source"]
    for words in (
        "50.0%",
        "128 bytes per token instead of 256",
        f"×{ratio:.3f}",
        "Healed on train.txt",
        "the distance of hidden states (weight 10)",
        "Calibrated on the short text that comes with tpa-convert, 2 sequences of 32 tokens.",
        "KL divergence",
        "kv_ratio: 0.5",
        "a <i> b",  # escaped, hence shown
    ):
        assert words in page.words, words
    assert str(run.parent) not in text
    assert "prefers-color-scheme: dark" in text
    assert page.addresses.count(page.addresses[0]) == 1, "both themes have the same picture"


@pytest.mark.parametrize("name", ["converted", "legacy"])
def test_a_page_of_a_model_that_was_never_measured(tmp_path: Path, run: Path, name: str) -> None:
    directory = tmp_path / name
    shutil.copytree(LEGACY if name == "legacy" else run / "converted", directory)
    record = directory / "tpa_convert.json"
    if record.exists():
        provenance = json.loads(record.read_text())
        del provenance["evaluate"]
        record.write_text(json.dumps(provenance))
    out = tmp_path / "page.html"
    result = tpa_convert("report", directory, "--out", out)
    assert result.exit_code == 0, result.output
    page = Page(out.read_text(encoding="utf-8"))
    assert page.open == []
    assert "It has not been measured on any text yet." in page.words
    assert "Results" not in page.words
    assert "exists" in error_of(tpa_convert("report", directory, "--out", out))


def test_results_from_a_file(tmp_path: Path, run: Path) -> None:
    legacy = tmp_path / "healed"
    shutil.copytree(LEGACY, legacy)
    out = tmp_path / "page.html"
    results = run / "report.json"
    assert tpa_convert("report", legacy, "--out", out, "--results", results).exit_code == 0
    assert "KL divergence" in Page(out.read_text(encoding="utf-8")).words
    wrong = tpa_convert("report", legacy, "--out", tmp_path / "other", "--results", out)
    assert "holds no results of eval --json or bench --json" in error_of(wrong)


def test_speed_from_a_file(tmp_path: Path, run: Path) -> None:
    points = tuple(
        SpeedPoint(model, 1, context, 1e4 / context, 50.0, 0.02, 128.0 * context, 0.001)
        for context in (128, 512)
        for model in ("source", "converted")
    )
    speed = SpeedReport("a device", "float32", False, 1e9, dict.fromkeys(("source",), 1e6), points)
    assert SpeedReport.from_json(json.loads(json.dumps(speed.to_json()))) == speed
    file, out = tmp_path / "bench.json", tmp_path / "page.html"
    file.write_text(json.dumps(speed.to_json()))
    result = tpa_convert("report", run / "healed", "--out", out, "--results", file)
    assert result.exit_code == 0, result.output
    page = Page(out.read_text(encoding="utf-8"))
    for words in ("Time of a decoding step", "Memory that the cache takes", "a device, float32"):
        assert words in page.words
    assert "Results" in page.words, "what the model's own record has is still there"


def test_loss_and_errors_by_layer(tmp_path: Path, run: Path) -> None:
    made, out = tmp_path / "made", tmp_path / "page.html"
    arguments = ("--kv-ratio", "0.25", "--calibration-blocks", "4", "--block-length", "32")
    source = run.parent / "source"
    assert tpa_convert("convert", source, *arguments, "--refit", "--out", made).exit_code == 0
    found = inspect(made)
    assert len(found.layer_nats) == len(found.layer_errors) == len(found.shapes)
    assert min(found.layer_nats) > 0
    assert all(after <= before for before, after in found.layer_errors)
    assert tpa_convert("report", made, "--out", out).exit_code == 0
    page = Page(out.read_text(encoding="utf-8"))
    for words in ("What the codes of each layer are expected to cost", "Error of each layer's"):
        assert words in page.words
        assert words not in Page((run / "report.html").read_text(encoding="utf-8")).words


def perplexities(**values: float) -> EvaluationReport:
    rows = (
        Row("Perplexity", "text", "perplexity", dict(values), False, True),
        Row("Cache", "bytes per token (bfloat16)", "bytes", dict.fromkeys(values, 8.0), False),
        Row(
            "Choices",
            "mean drop",
            "points",
            dict.fromkeys(values, 1.5),
            None,
            margins={"healed": 0.4},
        ),
    )
    return EvaluationReport(tuple(values), rows)


def test_a_card_speaks_of_its_own_column() -> None:
    report = perplexities(source=10.0, converted=15.0, healed=11.0)
    record = {"evaluate": {"report": report.to_json()}}
    assert quality(record, "small")[0] == (
        "Perplexity on text: 15.00, the source's 10.00 (×1.500)."
    )
    assert quality({**record, "heal": {}}, "small") == [
        "Perplexity on text: 11.00, the source's 10.00 (×1.100).",
        "mean drop: 1.50 ± 0.40 points.",
    ]
    two = perplexities(source=10.0, **{"a/half": 11.0, "a/third": 12.0})
    assert own_column(two, {}, "third") == "a/third"
    assert own_column(two, {}, "other") is None
    assert own_column(perplexities(source=1.0, small=2.0), {}, "other") == "small"


def test_pictures_that_would_be_empty_are_left_out() -> None:
    assert front([]) is None
    assert front([perplexities(source=1.0)]) is None
    assert front([perplexities(source=1.0, healed=2.0)]) is not None
    assert healing_curves(()) is None


def test_pictures_are_the_same_every_time(run: Path) -> None:
    curves = healing_curves(inspect(run / "healed").healings)
    assert curves is not None
    assert pictures(curves) == pictures(curves)
    assert render_report(inspect(run / "healed")) == render_report(inspect(run / "healed"))


def test_long_curves_are_thinned() -> None:
    points = [(i, 1.0 / i) for i in range(1, 1001)]
    kept = thinned(points)
    assert len(kept) == KEPT_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert thinned(points[:3]) == points[:3]
    assert thinned([]) == []


def test_a_card_does_not_count_the_text_of_moments_from_a_file() -> None:
    settings = {"calibration_blocks": 16, "block_length": 512}
    assert making({"convert": {"settings": settings}}) == [
        "Calibrated on the short text that comes with tpa-convert, 16 sequences of 512 tokens."
    ]
    settings = settings | {"moments": "measured.safetensors"}
    [said] = making({"convert": {"settings": settings}})
    assert "measured.safetensors" in said
    assert "16" not in said
