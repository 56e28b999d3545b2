"""Perplexity and agreement against the definitions, computed from whole logits."""

from __future__ import annotations

import importlib
import math

import datasets
import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.conftest import make_tiny_llama
from tpa_convert.errors import UserError
from tpa_convert.evaluation import (
    Perplexity,
    agreement,
    blocks_by_source,
    compare,
    geometric_mean,
    perplexity,
)
from tpa_convert.forward import logits
from tpa_convert.forward.comparison import block_scores
from tpa_convert.text.read import Text


def reference_log_p(model, blocks):
    with torch.no_grad():
        return model(input_ids=blocks).logits[:, :-1].float().log_softmax(-1)


def reference_nll(model, blocks):
    log_p = reference_log_p(model, blocks)
    return -log_p.gather(-1, blocks[:, 1:, None]).mean().item()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity(tiny_source_model, random_tokens, monkeypatch, batch_size) -> None:
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 7 * 128)  # several uneven chunks a batch
    blocks = random_tokens(5, 17)
    result = perplexity(tiny_source_model, blocks, batch_size=batch_size)
    assert result.tokens == 5 * 16
    assert result.nll_per_token == pytest.approx(reference_nll(tiny_source_model, blocks), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll_per_token))


def test_logits_changed_after_the_head_are_not_bypassed(random_tokens) -> None:
    config = Gemma2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    blocks = random_tokens(2, 9)
    result = perplexity(model, blocks)
    assert result.nll_per_token == pytest.approx(reference_nll(model, blocks), rel=1e-5)


def test_bfloat16_is_scored_in_float32(tiny_llama, random_tokens) -> None:
    model = tiny_llama().to(torch.bfloat16)
    blocks = random_tokens(2, 33)
    result = perplexity(model, blocks)
    assert result.nll_per_token == pytest.approx(reference_nll(model, blocks), rel=1e-5)


def test_agreement(tiny_llama, random_tokens) -> None:
    source, other = tiny_llama(seed=0), tiny_llama(seed=1)
    blocks = random_tokens(3, 20)
    p, q = reference_log_p(source, blocks), reference_log_p(other, blocks)
    result = agreement(source, other, blocks, batch_size=2)
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()
    assert expected > 0.1
    assert result.kl == pytest.approx(expected, rel=1e-5)
    assert result.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert result.tokens == 3 * 19


def test_compare_is_what_each_model_has_alone(tiny_llama, random_tokens) -> None:
    models = {"a": tiny_llama(seed=0), "b": tiny_llama(seed=1), "c": tiny_llama(seed=0)}
    blocks = random_tokens(3, 20)
    texts, agreements = compare(models, blocks, batch_size=2)
    for name, model in models.items():
        assert texts[name].nll_per_token == pytest.approx(perplexity(model, blocks).nll_per_token)
    assert list(agreements) == ["b", "c"]
    assert agreements["c"].kl == pytest.approx(0, abs=1e-7)
    assert agreements["c"].top1 == 1
    assert agreements["b"].kl > 0.1


def test_impossible_comparisons(tiny_llama, random_tokens) -> None:
    with pytest.raises(UserError, match="different vocabularies"):
        compare({"a": tiny_llama(), "b": tiny_llama(vocab_size=64)}, random_tokens(1, 8))
    with pytest.raises(UserError, match="at least 2 tokens"):
        perplexity(tiny_llama(), random_tokens(2, 1))


def documents() -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"text": ["a" * 50, "b" * 90, "c" * 50], "source": ["x", "y", "x"]}
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_blocks_by_source(tiny_tokenizer, streamed: bool) -> None:
    rows = documents()
    rows = rows.to_iterable_dataset() if streamed else rows
    blocks = blocks_by_source(tiny_tokenizer, rows, block_length=10, max_blocks=9)
    a = tiny_tokenizer("a")["input_ids"][-1]
    assert {name: len(part) for name, part in blocks.items()} == {"x": 9, "y": 9}
    assert {a, a + 2} <= set(blocks["x"].unique().tolist())
    assert set(blocks["y"].unique().tolist()) == {a + 1}


def test_plain_documents_are_one_text(tiny_tokenizer) -> None:
    unnamed = documents().remove_columns("source")
    assert list(blocks_by_source(tiny_tokenizer, unnamed, block_length=10)) == ["text"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["https://x/{}", "{}"])
def test_a_column_of_addresses_is_no_column_of_sources(
    tiny_tokenizer, name: str, streamed: bool
) -> None:
    """Too little text of each, or enough of each but too many to tell apart."""
    length, count = (9, 10) if "x" in name else (60, 21)
    columns = {"text": ["a" * length] * count, "source": [name.format(i) for i in range(count)]}
    rows = datasets.Dataset.from_dict(columns)
    text = Text("valid", rows.to_iterable_dataset() if streamed else rows)
    blocks = blocks_by_source(tiny_tokenizer, [text], block_length=50, max_blocks=100)
    assert {name: len(part) for name, part in blocks.items()} == {
        "valid": (length + 1) * count // 50
    }


def test_a_text_that_is_too_short_is_named(tiny_tokenizer) -> None:
    with pytest.raises(UserError, match="valid: the text has only 193 tokens"):
        blocks_by_source(tiny_tokenizer, [Text("valid", documents())], block_length=200)


def test_the_same_source_in_two_texts_is_measured_in_both(tiny_tokenizer) -> None:
    texts = [Text("one", documents()), Text("two", documents())]
    blocks = blocks_by_source(tiny_tokenizer, texts, block_length=10)
    assert list(blocks) == ["one: x", "one: y", "two: x", "two: y"]


def test_a_stream_leaves_room_for_the_texts_after_it(tiny_tokenizer, monkeypatch) -> None:
    module = importlib.import_module("tpa_convert.evaluation.texts")
    monkeypatch.setattr(module, "STREAMED_DOCUMENTS", 2)
    texts = [
        Text("hub", documents().remove_columns("source").to_iterable_dataset()),
        Text("more", documents().to_iterable_dataset()),
    ]
    blocks = blocks_by_source(tiny_tokenizer, texts, block_length=10)
    assert {name: len(part) for name, part in blocks.items()} == {"hub": 19, "x": 5, "y": 9}


def test_only_a_text_in_several_files_is_sampled(tiny_tokenizer) -> None:
    letters = [chr(97 + i) for i in range(20)]
    rows = datasets.Dataset.from_dict({"text": [letter * 9 for letter in letters]})
    ids = [tiny_tokenizer(letter)["input_ids"][-1] for letter in letters]
    for source in (None, "x"):
        named = rows.add_column("source", [source] * 20) if source else rows

        def first_ids(several_files: bool, named: datasets.Dataset = named) -> list[int]:
            texts = [Text("t", named, several_files)]
            (blocks,) = blocks_by_source(tiny_tokenizer, texts, 10, max_blocks=4).values()
            return blocks[:, 0].tolist()

        assert first_ids(False) == ids[:4]
        assert max(first_ids(True)) > max(ids[:4])
        assert first_ids(True) == first_ids(True)


def test_geometric_mean() -> None:
    assert geometric_mean([2, 8]) == pytest.approx(4)


def test_a_hopeless_model_does_not_overflow() -> None:
    assert Perplexity(nll_per_token=1e4, tokens=1).perplexity == math.inf


def test_only_counted_tokens_count(tiny_llama, random_tokens) -> None:
    """Two texts of different length, padded, against each on its own."""
    models = {"source": tiny_llama(seed=0), "model": tiny_llama(seed=1)}
    long, short = random_tokens(1, 20), random_tokens(1, 12, seed=1)
    padded = torch.cat((long, torch.nn.functional.pad(short, (0, 8))))
    counted = torch.zeros(2, 20, dtype=torch.bool)
    counted[0], counted[1, :12] = True, True
    texts, agreements = compare(models, padded, counted=counted)
    parts = [compare(models, part) for part in (long, short)]
    (one, _), (two, _) = parts
    nll = (19 * one["model"].nll_per_token + 11 * two["model"].nll_per_token) / 30
    assert texts["model"].tokens == 30
    assert texts["model"].nll_per_token == pytest.approx(nll, rel=1e-5)
    kl = (19 * parts[0][1]["model"].kl + 11 * parts[1][1]["model"].kl) / 30
    assert agreements["model"].kl == pytest.approx(kl, rel=1e-5)


def test_sums_of_blocks_are_what_each_gives_alone(tiny_source_model, random_tokens) -> None:
    other, blocks = make_tiny_llama("gqa", seed=5), random_tokens(5, 17)
    counted = torch.arange(17) < torch.tensor([[17], [9], [2], [12], [17]])
    models = {"source": tiny_source_model, "other": other}
    found = block_scores(models, blocks, counted=counted, batch_size=2)
    for i, block in enumerate(blocks):
        texts, agreements = compare(models, block[None], counted=counted[i][None])
        assert found["other"].tokens[i] == texts["other"].tokens == counted[i].sum() - 1
        for name, text in texts.items():
            nll = found[name].nll[i] / text.tokens
            assert nll.item() == pytest.approx(text.nll_per_token, rel=1e-5)
        kl = found["other"].kl[i] / texts["other"].tokens
        assert kl.item() == pytest.approx(agreements["other"].kl, rel=1e-5)
        same = found["other"].same[i] / texts["other"].tokens
        assert same.item() == pytest.approx(agreements["other"].top1)
    assert torch.equal(found["source"].same, found["source"].tokens.double())
    assert not found["source"].kl.any()
