"""Chats as data sets hold them, and as text by the template of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tpa_convert.errors import UserError

CHAT_COLUMNS = ("messages", "conversations")  # where data sets keep chats
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's names

Message = Mapping[str, Any]


def as_chat(value: Any) -> list[Message] | None:
    """The turns that a value of a column is, or is the JSON of: each with a role, or with `from`
    and `value`. None if it is something else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    turns = value if isinstance(value, list) else []
    named = [isinstance(turn, dict) and (turn.get("role") or turn.get("from")) for turn in turns]
    return turns if turns and all(named) else None


def packed_chat(turns: Sequence[Message]) -> str:
    """A chat as one line of JSON, as `rendered` and `plain` take it."""
    return json.dumps([_message(turn) for turn in turns], ensure_ascii=False)


def plain(chat: str) -> str:
    """What is said in a packed chat, turn by turn, without any template."""
    return "\n".join(_words(message.get("content")) for message in json.loads(chat))


def rendered(chat: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A packed chat by the tokenizer's template.

    Raises:
        UserError: no template, or it cannot render this chat.
    """
    return apply_template(tokenizer, json.loads(chat))


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Messages by the chat template of a tokenizer.

    Templates that want content as a list of parts get that.

    Raises:
        UserError: there is none, there are several and no default, or it fails.
    """
    template = tokenizer.chat_template
    if not template:
        raise UserError(
            "the source's tokenizer has no chat template for chats: take an instruct model as the "
            "source, or text that is no chat"
        )
    if isinstance(template, dict) and "default" not in template:
        raise UserError(
            f"the source's tokenizer has several chat templates ({', '.join(sorted(template))}) "
            "and none is called default: name one so in its chat_template"
        )
    words = [_words(message.get("content")) for message in messages]
    parts = [
        {**message, "content": [{"type": "text", "text": text}]}
        for message, text in zip(messages, words, strict=True)
    ]
    reason: Exception | None = None
    for form in (list(messages), parts):
        try:
            text = tokenizer.apply_chat_template(form, tokenize=False)
        except Exception as error:  # a template raises what it likes
            reason = reason or error
            continue
        # A template for parts finds nothing in a string and says so by leaving it out.
        if not any(words) or any(part and part.lower() in text.lower() for part in words):
            return text  # type: ignore[return-value]
        reason = reason or ValueError("it leaves out what is said")
    raise UserError(
        f"the source's chat template cannot render these messages ({_one_line(reason)}): mend the "
        "template, or take text that is no chat"
    )


def _message(turn: Message) -> Message:
    if turn.get("role"):
        # Tables have a field for all rows if one row has it.
        return {"content": "", **{name: value for name, value in turn.items() if value is not None}}
    return {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value") or ""}


def _words(content: Any) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
