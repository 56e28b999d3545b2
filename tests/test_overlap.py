"""Held-out text that the model is trained on is found by what it says, not only by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.command_line import CONVERT, error_of, save_source, tpa_convert
from tpa_convert.errors import UserError
from tpa_convert.options.declaration import validated
from tpa_convert.options.recipe import Recipe
from tpa_convert.pipeline.run import run
from tpa_convert.text.overlap import load_local, refuse_seen_documents

SENTENCES = [f"Sentence number {i} of a text that is long enough to count." for i in range(9)]


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """`save("a.jsonl", texts)` -> path of a file with these documents."""

    def write(name: str, texts: list[str]) -> str:
        (tmp_path / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return str(tmp_path / name)

    return write


def test_documents_in_both(save) -> None:
    training = load_local([save("a.jsonl", SENTENCES[:2]), save("b.jsonl", SENTENCES[2:6])])
    apart = {"valid": SENTENCES[6:]}
    refuse_seen_documents(training, apart)
    respaced = SENTENCES[3].replace(" ", "\n ") + " "
    with pytest.raises(
        UserError, match=r"^2 of 4 documents of test are in .*b\.jsonl too"
    ) as error:
        refuse_seen_documents(training, apart | {"test": [respaced, *SENTENCES[5:8]]})
    assert "\n" not in str(error.value)


def test_parts_and_short_documents_may_recur() -> None:
    refuse_seen_documents({"a": [SENTENCES[0] + SENTENCES[1], "Chapter 1"]}, {"b": SENTENCES})
    refuse_seen_documents({"a": ["Chapter 1"]}, {"b": ["Chapter 1"]})
    for whole in ([SENTENCES[0]], ["Chapter 1", SENTENCES[0] + SENTENCES[1]]):  # but these may not
        with pytest.raises(UserError, match="1 of 1 documents of b are in the training text a too"):
            refuse_seen_documents({"a": whole}, {"b": [whole[-1]]})


def test_streams_are_not_read(save) -> None:
    def unread() -> Any:
        raise AssertionError("read")

    stream = datasets.IterableDataset.from_generator(
        unread, features=datasets.Features({"text": datasets.Value("string")})
    )
    refuse_seen_documents({"owner/corpus": stream}, {"b": SENTENCES})
    assert load_local(["owner/corpus", save("a.jsonl", SENTENCES)]).keys() == {
        save("a.jsonl", SENTENCES)
    }


def test_healing_refuses_what_its_held_out_text_shares(tmp_path: Path, save) -> None:
    source = save_source(tmp_path / "source")
    converted = tmp_path / "converted"
    assert tpa_convert("convert", source, *CONVERT, "--out", converted).exit_code == 0
    train, valid = save("a.jsonl", SENTENCES), save("b.jsonl", SENTENCES[8:])
    texts = ["--text", f"{train}@1", "--valid-text", valid]
    result = tpa_convert("heal", converted, "--out", tmp_path / "healed", *texts)
    assert f"1 of 1 documents of {valid} are in the training text {train} too" in error_of(result)
    assert not list(tmp_path.glob("healed*"))


@pytest.mark.parametrize("section", ["heal", "convert"])
@pytest.mark.parametrize("kind", ["text", "query", "answer"])
def test_a_recipe_refuses_before_anything_is_done(tmp_path: Path, save, section, kind) -> None:
    train = save("a.jsonl", SENTENCES)
    question = {"query": SENTENCES[0], "choices": ["This.", "That."], "gold": 1}
    if kind == "answer":
        save("a.jsonl", [f"{SENTENCES[0]} That."])
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    evaluate = {"choices": str(tmp_path / "questions.jsonl")}
    if kind == "text":
        evaluate = {"text": save("test.jsonl", SENTENCES[4:])}
    values: dict[str, Any] = {
        "source": str(tmp_path / "nowhere"),
        "convert": {"kv_ratio": 0.5},
        "evaluate": evaluate,
    }
    values |= {"heal": {"text": train}} if section == "heal" else {}
    if section == "convert":
        values["convert"]["calibration"] = train
    with pytest.raises(UserError, match="are in the training text"):
        run(validated(Recipe, values), tmp_path / "out")
    assert not (tmp_path / "out").exists()
