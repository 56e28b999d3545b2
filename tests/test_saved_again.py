"""A converted model that something else saved again: weights and config, and no record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command_line import CONVERT, error_of, save_source, save_text, tpa_convert

EVAL = ["--no-speed", "--prompt", "", "--block-length", 32, "--max-blocks", 2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a model made from it, and that model saved again."""
    folder = tmp_path_factory.mktemp("models")
    save_source(folder / "origin")
    save_text(folder / "text.txt")
    options = [*CONVERT, "--dtype", "bfloat16", "--out", folder / "small"]
    assert tpa_convert("convert", folder / "origin", *options).exit_code == 0
    AutoModelForCausalLM.from_pretrained(folder / "small").save_pretrained(folder / "again")
    AutoTokenizer.from_pretrained(folder / "small").save_pretrained(folder / "again")
    assert not (folder / "again" / "tpa_convert.json").exists()
    return folder


def report_of(models: Path, tmp_path: Path, *arguments: object) -> dict[str, dict]:
    """Values of the rows by name; "models" has the columns."""
    path = tmp_path / "report.json"
    text = ["--text", models / "text.txt"]
    result = tpa_convert("eval", *arguments, *EVAL, *text, "--json", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    return {"models": report["models"], **{r["name"]: r["values"] for r in report["rows"]}}


def test_it_generates_what_it_did_before(models: Path) -> None:
    texts = [
        tpa_convert("generate", models / name, "Once", "--max-new-tokens", 5).stdout
        for name in ("small", "again")
    ]
    assert texts[0] == texts[1]
    assert len(texts[0].strip()) > len("Once")


def test_it_is_measured_alone(models: Path, tmp_path: Path) -> None:
    report = report_of(models, tmp_path, models / "again")
    assert report["models"] == ["again"]
    assert report["text"]["again"] > 1
    assert "KL divergence (nats per token)" not in report


def test_it_is_a_column_beside_others(models: Path, tmp_path: Path) -> None:
    report = report_of(models, tmp_path, models / "again", models / "small")
    assert report["models"] == ["source", "again", "converted"]  # which one of them records
    assert report["text"]["again"] == pytest.approx(report["text"]["converted"])
    assert report["text"]["again"] != pytest.approx(report["text"]["source"])


def test_it_is_compared_with_the_source_that_is_named(models: Path, tmp_path: Path) -> None:
    report = report_of(models, tmp_path, models / "again", "--against", models / "origin")
    assert report["models"] == ["source", "again"]
    assert report["KL divergence (nats per token)"]["again"] > 0


def test_a_source_is_measured_too(models: Path, tmp_path: Path) -> None:
    assert report_of(models, tmp_path, models / "origin")["models"] == ["origin"]
    both = report_of(models, tmp_path, models / "origin", models / "small")
    assert both["models"] == ["source", "converted"]  # there once, although named and recorded
    first = report_of(models, tmp_path, models / "origin", models / "again")
    assert first["models"] == ["origin", "again"]  # without a record the first is compared with
    assert first["KL divergence (nats per token)"]["again"] > 0


def test_another_model_is_a_column(models: Path, tmp_path: Path) -> None:
    other = save_source(tmp_path / "other", seed=1)
    report = report_of(models, tmp_path, models / "small", other)
    assert report["models"] == ["source", "converted", "other"]
    assert report["text"]["other"] != pytest.approx(report["text"]["source"])


def test_bytes_are_those_of_the_dry_run(models: Path, tmp_path: Path) -> None:
    """At 16 bits a number and in whole codes, although a CPU computes in another type."""
    plan = tmp_path / "plan.json"
    options = [*CONVERT, "--dtype", "bfloat16", "--dry-run", "--json", plan]
    assert tpa_convert("convert", models / "origin", *options).exit_code == 0
    predicted = json.loads(plan.read_text())
    for name in ("small", "again"):
        report = report_of(models, tmp_path, models / name, "--against", models / "origin")
        measured = report["bytes per token"]
        assert list(measured.values()) == [predicted["source_kv_bytes"], predicted["kv_bytes"]]


def test_a_card_needs_a_record(models: Path) -> None:
    message = error_of(tpa_convert("eval", models / "again", *EVAL, "--write-card"))
    assert "does not say how it was converted" in message
    assert "leave out --write-card" in message
    message = error_of(tpa_convert("eval", models / "origin", *EVAL, "--write-card"))
    assert "none of these models is a converted one: leave out --write-card" in message


def test_a_tokenizer_is_missed_in_one_line(models: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(models / "small").save_pretrained(tmp_path / "bare")
    message = error_of(tpa_convert("generate", tmp_path / "bare", "Once"))
    assert "holds no tokenizer" in message
    report = report_of(models, tmp_path, tmp_path / "bare", "--against", models / "origin")
    assert report["models"] == ["source", "bare"]  # the source's serves


def test_what_is_no_converted_model_does_not_generate(models: Path) -> None:
    message = error_of(tpa_convert("generate", models / "origin", "Once"))
    assert "is not a converted model" in message
    assert "no such directory" in error_of(tpa_convert("generate", models / "nowhere", "Once"))


def test_vocabularies_that_differ(models: Path, tmp_path: Path) -> None:
    from tests.conftest import make_tiny_llama, make_tiny_tokenizer

    make_tiny_llama(vocab_size=200).save_pretrained(tmp_path / "larger")
    make_tiny_tokenizer().save_pretrained(tmp_path / "larger")
    message = error_of(tpa_convert("eval", models / "small", tmp_path / "larger", *EVAL))
    assert "larger has a vocabulary of 200 tokens and source one of 128" in message
