"""Training text from several texts, each with its share of the tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch

from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tpa_convert.errors import UserError
from tpa_convert.healing import HealingReport, HealingSettings, heal
from tpa_convert.text.mixture import load_mixture, mixture_blocks

TOKENIZER = make_tiny_tokenizer()


@pytest.fixture
def letters(tmp_path: Path) -> Callable[..., str]:
    """`letters("a", 90)` -> a file of documents with 10 tokens each, all the same letter."""

    def write(letter: str, documents: int) -> str:
        path = tmp_path / f"{letter}.txt"
        path.write_text("\f".join([letter * 9] * documents))
        return str(path)

    return write


def shares(blocks: torch.Tensor) -> dict[str, int]:
    """Blocks by the letter of their first token."""
    return dict(Counter(TOKENIZER.decode(block[:1].long()) for block in blocks))


def mixed(texts: dict[str, float | None], count: int, seed: int = 0) -> torch.Tensor:
    return mixture_blocks(load_mixture(list(texts.items())), TOKENIZER, 20, count, seed)


def test_shares_are_shares_of_tokens_also_where_a_text_runs_out(letters) -> None:
    texts = {letters("a", 8): 3.0, letters("b", 1000): 1.0}  # 4 blocks of a, hundreds of b
    blocks = mixed(texts, 40)
    assert shares(blocks) == {"a": 30, "b": 10}
    assert torch.equal(blocks, mixed(texts, 40))


def test_a_text_that_is_read_again_is_read_evenly(tmp_path: Path) -> None:
    texts = {}
    for name, letters in (("lower", "abcd"), ("upper", "ABCD")):
        path = tmp_path / f"{name}.txt"
        path.write_text("\f".join(letter * 19 for letter in letters))
        texts[str(path)] = 1.0 if name == "lower" else 2.0
    counts = shares(mixed(texts, 33))
    assert sum(counts[letter] for letter in "abcd") == 11
    assert {counts[letter] for letter in "abcd"} == {2, 3}
    assert {counts[letter] for letter in "ABCD"} == {5, 6}


def test_without_shares_files_count_by_their_size(letters) -> None:
    blocks = mixed({letters("a", 20): None, letters("b", 60): None}, 1000)
    assert blocks.shape == (40, 20)  # once; the training reads it again
    assert (blocks.long() == TOKENIZER.convert_tokens_to_ids("a")).sum() == 20 * 9


def test_a_missing_share_is_one(letters) -> None:
    assert shares(mixed({letters("a", 20): 3.0, letters("b", 60): None}, 8)) == {"a": 6, "b": 2}


def test_streams_and_files_are_mixed(letters, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Iterator[dict[str, str]]:
        while True:
            yield {"text": "s" * 9}

    stream = datasets.IterableDataset.from_generator(endless)
    monkeypatch.setattr("tpa_convert.text.read._load_hub", lambda name, column, split: stream)
    for share in (None, 1.0):  # a stream has no size, so equal shares are what no shares mean
        blocks = mixed({"owner/corpus": share, letters("a", 8): share}, 10)
        assert shares(blocks) == {"s": 5, "a": 5}


def test_texts_too_short_for_a_block(letters) -> None:
    tiny, big = letters("a", 1), letters("b", 100)
    with pytest.raises(UserError, match=r"a\.txt: the text has only 10 tokens"):
        mixed({tiny: 1.0, big: 1.0}, 10)
    with pytest.raises(UserError, match=r"the share of .*a\.txt in 10 sequences is less than one"):
        mixed({tiny: 0.01, big: 1.0}, 10)


def test_a_checkpoint_is_tied_to_the_mixture(letters, tmp_path: Path) -> None:
    texts = {letters("a", 8): 1.0, letters("b", 100): 3.0}
    settings = HealingSettings(tokens=8 * 40, tokens_per_step=40, batch_size=2)

    def healed(blocks: torch.Tensor) -> HealingReport:
        student, teacher = make_tiny_llama(seed=1), make_tiny_llama()
        return heal(
            student,
            teacher,
            None,
            blocks,
            settings=settings,
            output_dir=tmp_path / "run",
            progress=False,
        )

    assert healed(mixed(texts, 16)).steps == 8
    assert healed(mixed(texts, 16)).resumed_from == 8
    with pytest.raises(UserError, match="belongs to a run with different text"):
        healed(mixed(dict.fromkeys(texts, 1.0), 16))
