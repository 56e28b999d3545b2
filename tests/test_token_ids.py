"""Tokens that a tokenizer has and the model's embedding has not: one line before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.conversions import convert_tiny, source_of
from tpa_convert.calibration.moments import collect_moments
from tpa_convert.errors import UserError
from tpa_convert.evaluation.metrics.multiple_choice import Question, multiple_choice
from tpa_convert.forward.comparison import perplexity
from tpa_convert.forward.ids import check_ids
from tpa_convert.healing import HealingSettings, heal
from tpa_convert.healing.training.sampling import sample_blocks
from tpa_convert.pipeline import convert
from tpa_convert.recipe import ConvertOptions

TOLD = "token id 128, and the embedding of .* only 128 rows"
BLOCKS = torch.full((8, 16), 5)
TOO_LARGE = BLOCKS.clone()
TOO_LARGE[-1, -1] = 128


def calibrate(model: PreTrainedModel, blocks: Any, path: Path) -> None:
    collect_moments(source_of(model), blocks)


def measure(model: PreTrainedModel, blocks: Any, path: Path) -> None:
    perplexity(model, blocks)


def train(model: PreTrainedModel, blocks: Any, path: Path) -> None:
    settings = HealingSettings(tokens=128, tokens_per_step=128, block_length=16)
    student = convert_tiny(model, kv_ratio=0.5)
    heal(student, model, None, blocks, settings=settings, output_dir=path, progress=False)


@pytest.mark.parametrize("work", [calibrate, measure, train])
def test_every_use_of_text_says_it(work: Callable[..., None], tmp_path: Path) -> None:
    model = make_tiny_llama()
    work(model, BLOCKS, tmp_path / "fits")
    with pytest.raises(UserError, match=TOLD):
        work(model, TOO_LARGE, tmp_path / "too-large")


def test_questions_and_sampling_say_it() -> None:
    model, tokenizer = make_tiny_llama(), make_tiny_tokenizer()
    questions = [Question("a", ("b", "c<new>"), 0)]
    multiple_choice(model, tokenizer, questions)
    sample_blocks(model, tokenizer, 8, 8)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(28)]})
    tokenizer.add_special_tokens({"bos_token": "<new>"})
    with pytest.raises(UserError, match=TOLD):
        multiple_choice(model, tokenizer, questions)
    with pytest.raises(UserError, match=TOLD):
        sample_blocks(model, tokenizer, 8, 8)


def test_a_command_says_it_in_one_line(tiny_checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint()
    text = tmp_path / "text.txt"
    text.write_text("words and <new>" * 100)
    options = ConvertOptions(
        kv_ratio=0.5, calibration=[str(text)], calibration_blocks=4, block_length=32
    )
    convert(str(source), tmp_path / "fits", options)
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(28)]})
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(source)
    with pytest.raises(UserError, match=TOLD) as raised:
        convert(str(source), tmp_path / "too-large", options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "too-large").exists()


def test_the_last_row_is_a_row() -> None:
    model = make_tiny_llama()
    check_ids(model, 127)
    check_ids(model, torch.empty(0, 4, dtype=torch.long))
    with pytest.raises(UserError, match=TOLD):
        check_ids(model, 128)
