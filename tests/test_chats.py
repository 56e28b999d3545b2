"""Chats as data, and the templates of tokenizers, good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.conftest import make_tiny_tokenizer
from tpa_convert.errors import UserError
from tpa_convert.healing.training.chat import chat_script
from tpa_convert.text.chat import apply_template
from tpa_convert.text.overlap import refuse_seen_documents
from tpa_convert.text.packing import packed_blocks
from tpa_convert.text.read import load_documents, token_blocks
from tpa_convert.text.tokens import texts_of

TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
CHAT = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
]
RENDERED = "[user]a question</s>[assistant]an answer</s>"
SHAREGPT = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "an answer"}]
PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
TOOLS = [{**CHAT[0], "name": "me"}, CHAT[1], {"role": "tool", "content": None}]


def tokenizer_with(template: Any) -> Any:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    ("column", "chat"),
    [("messages", CHAT), ("conversations", SHAREGPT), ("messages", json.dumps(CHAT))],
)
def test_chats_are_rendered_with_the_template(tmp_path, suffix, column, chat) -> None:
    path = write(tmp_path / f"chats{suffix}", [{column: chat, "n": 1}, {column: chat, "n": 2}])
    for documents in (load_documents(path), load_documents(path, text_column=column)):
        assert list(texts_of(documents, tokenizer_with(TURNS))) == [RENDERED] * 2
        assert list(documents["text"]) == ["a question\nan answer"] * 2
    other = tokenizer_with("{{ messages[0]['content'] }}")
    assert next(iter(texts_of(documents, other))) == "a question"


def test_blocks_for_calibration_and_healing_hold_the_rendered_chats(tmp_path: Path) -> None:
    documents = load_documents(write(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 20))
    tokenizer = tokenizer_with(TURNS)
    for make in (token_blocks, packed_blocks):
        text = tokenizer.decode(make(documents, tokenizer, 64)[0].tolist())
        assert RENDERED in text
        assert RENDERED not in tokenizer.decode(
            make(documents, tokenizer_with("{{ messages }}"), 64)[0].tolist()
        )


def test_ragged_chats(tmp_path: Path) -> None:
    """Content that is text here and parts there, turns with more fields, empty chats."""
    rows = [{"messages": CHAT}, {"messages": PARTS}, {"messages": TOOLS}, {"messages": []}]
    documents = load_documents(write(tmp_path / "chats.jsonl", rows))
    texts = list(texts_of(documents, tokenizer_with(TURNS)))
    assert len(texts) == 3
    assert texts[0] == RENDERED
    assert texts[2].endswith("[tool]</s>")
    assert list(documents["text"])[1] == "a question\nan answer"


def test_chats_and_texts_go_together(tmp_path: Path) -> None:
    chats = write(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    (tmp_path / "text.txt").write_text("plain words")
    for spec in ([chats, tmp_path / "text.txt"], tmp_path):
        found = list(texts_of(load_documents(spec), tokenizer_with(TURNS)))
        assert sorted(found) == [RENDERED, "plain words"]


def test_a_text_that_looks_like_a_list_is_a_text(tmp_path: Path) -> None:
    rows = [{"text": '["words"]', "messages": CHAT}]
    documents = load_documents(write(tmp_path / "a.jsonl", rows))
    assert list(texts_of(documents, tokenizer_with(TURNS))) == ['["words"]']


def test_chats_that_are_held_out_are_found_in_the_training_text(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "words that are long enough " * 3}]
    path = write(tmp_path / "chats.jsonl", [{"messages": long}])
    with pytest.raises(UserError, match="1 of 1 documents"):
        refuse_seen_documents({"train": load_documents(path)}, {"test": load_documents(path)})
    refuse_seen_documents({"train": ["others"]}, {"test": load_documents(path)})


# ---------------------------------------------------------------------------------- templates

TEMPLATES: dict[str, Any] = {
    "plain": TURNS,
    "content as parts": TURNS.replace("m['content']", "m['content'][0]['text']"),
    "named": {"default": TURNS, "tool_use": "tools " + TURNS},
}
BAD: dict[str, tuple[Any, str]] = {
    "none": (None, "no chat template"),
    "raises": ("{{ raise_exception('use another tool') }}", "use another tool"),
    "needs a variable": ("{{ nothing.value }}" + TURNS, "nothing.* is undefined"),
    "syntax error": ("{% for m in messages %}", "cannot render"),
    "leaves everything out": ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "leaves out"),
    "several, no default": (
        {"rag": TURNS, "tool_use": TURNS},
        r"several chat templates \(rag, tool_use\)",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_work(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    assert apply_template(tokenizer, CHAT) == RENDERED
    assert tokenizer.decode(chat_script(tokenizer).prefix) == "[user]"


@pytest.mark.parametrize("name", BAD)
def test_templates_that_do_not_are_told_in_one_line(name: str, tmp_path: Path) -> None:
    template, words = BAD[name]
    tokenizer = tokenizer_with(template)
    documents = load_documents(write(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 9))
    for use in (chat_script, lambda given: token_blocks(documents, given, 8)):
        with pytest.raises(UserError, match=words) as raised:
            use(tokenizer)
        assert "\n" not in str(raised.value)


def test_named_templates_survive(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(TEMPLATES["named"])
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert type(tokenizer).from_pretrained(tmp_path).chat_template == TEMPLATES["named"]
