"""`chat`: answers are those of a model that reads the whole conversation anew; figures are live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import CONVERT, error_of, save_source, tpa_convert
from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.conversions import convert_tiny
from tests.test_generation import SPEAKING
from tpa_convert.cli.conversation import figures
from tpa_convert.errors import UserError
from tpa_convert.options.usage import ChatOptions
from tpa_convert.pipeline.chat import Chat, Progress

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SOURCE_BYTES = 256


def begun(template: str | None = TEMPLATE, **options: Any) -> Chat:
    model = convert_tiny(make_tiny_llama("gqa", **SPEAKING), kv_floats=14, gauge="applied")
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = list(range(99, 128))  # no characters of the tokenizer
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    return Chat(model, tokenizer, ChatOptions(max_new_tokens=8, **options), SOURCE_BYTES)


def anew(chat: Chat, conversation: str) -> str:
    """The answer of the model when it reads `conversation` from its first token on."""
    tokens = torch.tensor([chat.tokenizer(conversation)["input_ids"]])
    output = chat.model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return chat.tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


def nothing(_: Progress) -> None:
    pass


@pytest.mark.parametrize("system", [None, "be brief"])
def test_turns_are_as_if_read_anew(system) -> None:
    chat = begun(system=system)
    said = f"[system]{system}\n" if system else ""
    for question in ("hello", "and then?", "why"):
        said += f"[user]{question}\n[assistant]"
        expected = anew(chat, said)
        assert chat.say(question, nothing).text == expected
        said += f"{expected}\n"
    chat.clear()
    assert len(chat.messages) == (1 if system else 0)


def test_what_was_said_stays_in_the_cache(monkeypatch) -> None:
    chat = begun()
    chat.say("hello", nothing)
    first = chat.cache
    lengths = []
    forward = type(chat.model.model.layers[0].self_attn).forward

    def noted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(hidden_states.shape[1])
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(chat.model.model.layers[0].self_attn), "forward", noted)
    chat.say("and?", nothing)
    assert chat.cache is first
    # The last token of the answer, a new line and the question; not what was read before.
    assert max(lengths) <= len("x\n[user]and?\n[assistant]")


def test_without_a_template_the_text_goes_on() -> None:
    chat = begun(template=None)
    first = chat.say("once upon", nothing).text
    assert first == anew(chat, "once upon")
    assert chat.say(" a time", nothing).text == anew(chat, f"once upon{first} a time")


def test_figures_are_measured_on_the_live_cache() -> None:
    chat = begun()
    seen: list[Progress] = []
    done = chat.say("hello", seen.append)
    assert [progress.tokens for progress in seen] == list(range(1, 9))
    assert done.text.startswith(seen[3].text)
    per_token = sum(chat.model.config.cached_floats) * 4
    for progress in seen[1:]:
        assert progress.cache_bytes == progress.cached_tokens * per_token
        assert progress.source_bytes == progress.cached_tokens * SOURCE_BYTES
    assert seen[1].cached_tokens < seen[-1].cached_tokens
    line = figures(Progress("", 8, 41.26, 20, 20 * 112, 20 * 256))
    assert line == "8 tokens, 41.3 tokens/s; cache 2.2 kB for 20 tokens, the source's 5.1 kB (44%)"


def test_an_answer_that_is_stopped_leaves_a_chat_that_goes_on() -> None:
    chat = begun()

    def stop(progress: Progress) -> None:
        if progress.tokens == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say("hello", stop)
    partial = chat.messages[-1]["content"]
    said = f"[user]hello\n[assistant]{partial}\n[user]more\n[assistant]"
    expected = anew(chat, said)
    assert chat.say("more", nothing).text == expected


def test_a_chat_that_is_too_long_is_told() -> None:
    chat = begun()
    with pytest.raises(UserError, match="begin another with /clear"):
        chat.say("x" * 300, nothing)
    assert chat.messages == []


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    out = folder / "converted"
    result = tpa_convert("convert", save_source(folder / "source"), *CONVERT, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_lines_from_standard_input(converted: Path) -> None:
    lines = "hello\n\n/clear\nhello\n/quit\nmore\n"
    result = tpa_convert("chat", converted, "--max-new-tokens", "4", text=lines)
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "tokens; cache" in line or "/s;" in line]
    assert len(told) == 2
    same = [line.partition("; ")[2] for line in told]
    assert same[0] == same[1], "the second chat began where the first had ended"


def test_what_is_no_model_is_told(converted: Path) -> None:
    assert "not a converted model" in error_of(tpa_convert("chat", converted.parent / "source"))
