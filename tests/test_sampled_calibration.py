"""Calibration on text that the source samples itself, beside a given one or alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.command_line import error_of, save_source, save_text, tpa_convert
from tpa_convert.export.save import read_provenance
from tpa_convert.options.conversion import ConvertOptions
from tpa_convert.pipeline.calibration import (
    SAMPLED_FROM,
    SAMPLED_UP_TO,
    sampled_blocks,
    text_blocks,
    with_sampled,
)
from tpa_convert.progress import no_tracking
from tpa_convert.sources import Source, load_source, open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("sampled") / "source")


def options(**changes: object) -> ConvertOptions:
    given = {"kv_ratio": 0.5, "calibration_blocks": 6, "block_length": 16} | changes
    return ConvertOptions(**given)


def blocks(source: Source, chosen: ConvertOptions, kept: Path | None = None) -> Tensor:
    return with_sampled(source, chosen, text_blocks(source, chosen), no_tracking, kept)


def rows(tensor: Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in tensor.tolist()}


def test_half_is_sampled_where_no_text_is_given_and_the_source_is_small() -> None:
    assert sampled_blocks(options(), 10**8) == 3
    assert sampled_blocks(options(calibration=["a.txt"]), 10**8) == 0
    assert sampled_blocks(options(), int(SAMPLED_UP_TO) + 1) == 0
    assert sampled_blocks(options(), int(SAMPLED_FROM) - 1) == 0
    assert sampled_blocks(options(sampled_blocks=2), int(SAMPLED_UP_TO) + 1) == 2
    assert sampled_blocks(options(calibration=["a.txt"], sampled_blocks=2), 10**8) == 2
    assert sampled_blocks(options(sampled_blocks=0), 10**8) == 0


def test_sampled_blocks_are_among_those_of_the_text(folder) -> None:
    source = load_source(folder)
    found = blocks(source, options(sampled_blocks=3))
    assert found.shape == (6, 16)
    text = text_blocks(source, options(sampled_blocks=3))
    assert len(text) == 3
    assert rows(text) < rows(found)
    sampled = rows(found) - rows(text)
    assert len(sampled) == 3
    start = source.tokenizer.bos_token_id
    assert all(row[0] == start for row in sampled)
    assert not torch.equal(found[:3], text)  # in random order: what is held out is of both
    assert torch.equal(blocks(source, options(sampled_blocks=3)), found)
    assert not torch.equal(blocks(source, options(seed=1, sampled_blocks=3)), found)
    alone = blocks(source, options(sampled_blocks=6))
    assert rows(alone).isdisjoint(rows(text))
    assert len(rows(alone)) == 6


@pytest.mark.parametrize(("length", "starts"), [(16, [0, 6, 12]), (12, [0, 6]), (7, [0, 4])])
def test_a_block_holds_several_sampled_texts(folder, monkeypatch, length, starts) -> None:
    monkeypatch.setattr("tpa_convert.pipeline.calibration.SAMPLED_LENGTH", 6)
    source = load_source(folder)
    found = blocks(source, options(sampled_blocks=6, block_length=length))
    assert found.shape == (6, length)
    often = (found == source.tokenizer.bos_token_id).sum(0)
    assert [position for position in range(length) if often[position] == 6] == starts


def test_a_source_that_is_read_on_demand_samples_the_same(folder) -> None:
    streamed = open_source(folder)
    found = blocks(streamed, options(sampled_blocks=3))
    assert torch.equal(found, blocks(load_source(folder), options(sampled_blocks=3)))
    # and lets go of its weights afterwards
    assert all(p.is_meta for p in streamed.model.get_decoder().layers.parameters())


def test_what_is_sampled_is_kept_for_a_run_that_goes_on(folder, tmp_path) -> None:
    source, kept = load_source(folder), tmp_path / "sampled.npy"
    found = blocks(source, options(sampled_blocks=3), kept)
    with torch.no_grad():
        for parameter in source.model.parameters():
            parameter.zero_()
    assert torch.equal(blocks(source, options(sampled_blocks=3), kept), found)
    assert not torch.equal(blocks(source, options(sampled_blocks=3)), found)  # negative control


def test_a_tokenizer_without_a_start_has_text_alone_unless_asked(folder, monkeypatch) -> None:
    monkeypatch.setattr("tpa_convert.pipeline.calibration.SAMPLED_FROM", 0)
    source = load_source(folder)
    assert len(text_blocks(source, options())) == 3
    source.tokenizer.bos_token = source.tokenizer.eos_token = None
    assert torch.equal(blocks(source, options()), text_blocks(source, options()))
    assert len(text_blocks(source, options())) == 6
    with pytest.raises(Exception, match="no begin-of-text token"):
        blocks(source, options(sampled_blocks=2))


def test_the_command_samples_and_says_so(folder, tmp_path) -> None:
    save_text(tmp_path / "text.txt")
    convert = ("convert", folder, "--kv-ratio", 0.5, "--calibration-blocks", 4)
    short = (*convert, "--block-length", 16, "--out")
    result = tpa_convert(*short, tmp_path / "half", "--sampled-blocks", 2)
    assert result.exit_code == 0, result.output
    assert read_provenance(tmp_path / "half")["convert"]["sampled_blocks"] == 2
    assert "2 of them sampled from the source" in (tmp_path / "half" / "README.md").read_text()
    result = tpa_convert(*short, tmp_path / "text", "--calibration", tmp_path / "text.txt")
    assert result.exit_code == 0, result.output
    assert read_provenance(tmp_path / "text")["convert"]["sampled_blocks"] == 0
    assert "sampled from the source" not in (tmp_path / "text" / "README.md").read_text()
    many = tpa_convert(*short, tmp_path / "many", "--sampled-blocks", 5)
    assert "5 of 4 sequences are too many" in error_of(many)
