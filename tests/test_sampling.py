"""Text sampled from the source: distributed as the source says, and enough to heal on."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import StaticCache

from tests.command_line import CONVERT, error_of, save_source, save_text, tpa_convert
from tests.conftest import make_tiny_llama
from tpa_convert.cli import terminal
from tpa_convert.errors import UserError
from tpa_convert.healing.training.chat import chat_script
from tpa_convert.healing.training.sampling import GROUPED_SDPA, sample_blocks


class Tokenizer:
    """Only what sampling asks of a tokenizer."""

    def __init__(self, bos: int | None = 1, eos: int | None = 2):
        self.bos_token_id = bos
        self.eos_token_id = eos


def sample(model, tokenizer=None, **options) -> torch.Tensor:
    options = {"tokens": 60, "block_length": 8, "batch_size": 3} | options
    return sample_blocks(model, tokenizer or Tokenizer(), **options)


def test_blocks_are_whole_and_start_with_the_begin_of_text() -> None:
    model = make_tiny_llama()
    before = model.generation_config
    blocks = sample(model)
    assert blocks.shape == (8, 8)
    assert (blocks[:, 0] == 1).all()
    assert len({tuple(block) for block in blocks.tolist()}) > 1
    assert model.generation_config is before


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model = make_tiny_llama()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = sample(model, seed=5)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(sample(model, seed=5), first)
    assert not torch.equal(sample(model, seed=6), first)


def test_tokens_follow_the_distribution_of_the_model() -> None:
    """No top-k, no end: the first sampled token has the model's own probabilities."""
    model = make_tiny_llama(vocab_size=8)
    model.generation_config.eos_token_id = 2  # must not end a block
    start = torch.ones(1, 1, dtype=torch.long)
    expected = model(start).logits[0, -1].softmax(-1)
    blocks = sample(model, tokens=8000, block_length=4, batch_size=2000)
    share = blocks[:, 1].bincount(minlength=8) / len(blocks)
    # five standard errors of 2000 draws
    error = 5 * (expected * (1 - expected) / len(blocks)).sqrt()
    assert ((share - expected).abs() < error + 1e-3).all()


def test_a_cold_model_repeats_its_likeliest_text() -> None:
    model, start = make_tiny_llama(), torch.ones(1, 1, dtype=torch.long)
    likeliest = start
    for _ in range(7):
        logits = model(likeliest, use_cache=False).logits[:, -1]
        likeliest = torch.cat((likeliest, logits.argmax(-1, keepdim=True)), dim=1)
    assert len(likeliest.unique()) > 4  # a text that says something
    blocks = sample(model, temperature=1e-4)
    assert (blocks == likeliest).all()


def test_decoding_for_samples_equals_the_model() -> None:
    model = make_tiny_llama()
    tokens = torch.randint(3, 20, (2, 9))
    expected = model(tokens).logits
    model.set_attn_implementation(GROUPED_SDPA)
    cache = StaticCache(config=model.config, max_cache_len=16)
    parts = [tokens[:, :4], *tokens[:, 4:].split(1, dim=1)]
    logits = torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_without_any_start_token() -> None:
    with pytest.raises(UserError, match="no begin-of-text token"):
        sample(make_tiny_llama(), Tokenizer(bos=None, eos=None))
    assert (sample(make_tiny_llama(), Tokenizer(bos=None, eos=7))[:, 0] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("chat", [False, True])
def test_on_a_gpu_in_bfloat16(tiny_tokenizer, chat: bool) -> None:
    model = make_tiny_llama().to("cuda", torch.bfloat16)
    tiny_tokenizer.chat_template = TEMPLATE
    first, again = (
        sample_blocks(model, tiny_tokenizer, 600, 16, batch_size=16, chat=chat) for _ in range(2)
    )
    assert first.shape == (38, 16)
    assert torch.equal(first, again)
    assert "_compiled_call" not in vars(model)


# ------------------------------------------------------------------------------- chats

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>Q:{{ m.content }}#A:"
    "{% else %}{{ m.content }}</s>~{% endif %}{% endfor %}"
)


def test_the_script_of_a_chat_template(tiny_tokenizer) -> None:
    """A turn ends with its special token, or where there is none, with the first token after it."""
    tiny_tokenizer.chat_template = TEMPLATE
    script = chat_script(tiny_tokenizer)
    assert tiny_tokenizer.decode(script.prefix) == "<s>Q:"
    assert tiny_tokenizer.decode(script.question_end) == "#"
    assert tiny_tokenizer.decode(script.between) == "A:"
    assert script.answer_end == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(script.after) == "~"


def test_chats_follow_their_template(tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = TEMPLATE
    model = make_tiny_llama(vocab_size=len(tiny_tokenizer), initializer_range=0.02)
    blocks = sample_blocks(model, tiny_tokenizer, 20 * 400, 400, chat=True)
    assert blocks.shape == (20, 400)
    texts = [tiny_tokenizer.decode(block) for block in blocks]
    assert len({text[5:9] for text in texts}) > 10  # the model speaks, and not always the same
    whole = re.compile(r"<s>Q:[^#]*#A:.*?</s>~(?=<s>Q:)", re.DOTALL)
    assert sum(len(whole.findall(text)) for text in texts) > 5
    for text in texts:
        rest = whole.sub("", text)  # one chat, which the end of the block cuts
        assert re.fullmatch(r"<s>Q:[^#]*(#|#A|#A:.*)?", rest, re.DOTALL), rest


def test_chats_need_a_template(tiny_tokenizer) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        sample_blocks(make_tiny_llama(), tiny_tokenizer, 60, 8, chat=True)
    tiny_tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="does not mark where a turn begins"):
        sample_blocks(make_tiny_llama(), tiny_tokenizer, 60, 8, chat=True)
    tiny_tokenizer.chat_template = TEMPLATE
    with pytest.raises(UserError, match=r"takes 3 tokens .* block_length must be larger, not 3"):
        sample_blocks(make_tiny_llama(), tiny_tokenizer, 60, 3, chat=True)


@pytest.mark.parametrize(
    ("option", "sampled", "with_text"),
    [("sampled_tokens", 100, False), ("sampled_chat_tokens", 60, True)],
)
def test_healing_on_sampled_text(
    tmp_path: Path, option: str, sampled: int, with_text: bool, tiny_tokenizer
) -> None:
    source = save_source(tmp_path / "source")
    tiny_tokenizer.chat_template = TEMPLATE
    tiny_tokenizer.save_pretrained(source)
    converted, healed = tmp_path / "converted", tmp_path / "healed"
    assert tpa_convert("convert", source, *CONVERT, "--out", converted).exit_code == 0
    short = ["--tokens", 128, "--tokens-per-step", 64, "--block-length", 32, "--out", healed]
    texts = [f"{save_text(tmp_path / 'a.txt')}@2", save_text(tmp_path / "b.txt")]
    text = [part for path in texts for part in ("--text", path)] if with_text else []
    result = tpa_convert("heal", converted, *short, "--" + option.replace("_", "-"), sampled, *text)
    assert result.exit_code == 0, result.output
    record = json.loads((healed / "tpa_convert.json").read_text())["heal"]
    assert record["settings"][option] == sampled
    assert re.search(r"^sampling \w+: [\d,]+ tokens/s$", result.stderr, re.MULTILINE)
    assert len(record["settings"]["text"]) == 2 * with_text
    assert record["report"]["tokens"] == 128
    assert (healed / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "![Perplexity" in (healed / "README.md").read_text()


def test_text_is_sampled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails afterwards; but again for another seed or length."""
    source, converted = save_source(tmp_path / "source"), tmp_path / "converted"
    assert tpa_convert("convert", source, *CONVERT, "--out", converted).exit_code == 0
    lengths: list[int] = []

    def sample(*arguments: Any, **keywords: Any) -> Any:
        lengths.append(arguments[3])
        return sample_blocks(*arguments, **keywords)

    def fail(*_: Any, **__: Any) -> None:
        raise UserError("out of GPU memory")

    monkeypatch.setattr("tpa_convert.pipeline.training_text.sample_blocks", sample)
    short = ["--tokens", 128, "--tokens-per-step", 64, "--sampled-tokens", 60]
    heal = ["heal", converted, *short, "--out", tmp_path / "healed"]
    with monkeypatch.context() as patch:
        patch.setattr("tpa_convert.pipeline.healing.heal_model", fail)
        for options in ([], [], ["--seed", 1]):
            result = tpa_convert(*heal, "--block-length", 32, *options)
            assert "error: out of GPU memory" in result.stderr
    assert lengths == [32, 32]
    assert tpa_convert(*heal, "--block-length", 16).exit_code == 0
    assert lengths == [32, 32, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--block-length", 48],
            "--tokens-per-step must be a multiple of the block length 48",
        ),
        (["--sampled-tokens", 200], "224 tokens to sample are too many: the run trains on 128"),
        (["--sampled-tokens", 97, "--text", "a.txt"], "128, and some are for the text"),
    ],
)
def test_shares_of_a_run_that_cannot_be(
    options: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is sampled or even loaded."""
    monkeypatch.chdir(tmp_path)
    save_text(tmp_path / "a.txt")
    source, converted = save_source(tmp_path / "source"), tmp_path / "converted"
    assert tpa_convert("convert", source, *CONVERT, "--out", converted).exit_code == 0
    short = ["--tokens", 128, "--tokens-per-step", 64, "--block-length", 32, "--out", "healed"]
    result = tpa_convert("heal", converted, *short, "--sampled-tokens", 32, *options)
    assert message in error_of(result)
    assert not (tmp_path / "healed.healing").exists()


def test_a_terminal_shows_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(terminal, "err_console", output)
    assert list(terminal.track([1, 2], "sampling text", tokens=1000)) == [1, 2]
    assert re.search(r"2/2.*[1-9][\d,]* tokens/s", output.file.getvalue())


def test_no_text_at_all(tmp_path: Path) -> None:
    result = tpa_convert("heal", tmp_path, "--out", tmp_path / "healed")
    assert "give --text, --sampled-tokens or --sampled-chat-tokens" in error_of(result)
