"""GGUF files of converted models, read back by the package gguf and by transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.conversions import convert_tiny, random_blocks
from tpa_convert.errors import UserError
from tpa_convert.export.gguf import PRE_BY_PATTERN, ROPE_FREQS, check_tokenizer, write_gguf
from tpa_convert.export.llama import to_llama

gguf = pytest.importorskip("gguf")


def byte_level_tokenizer(*before: Any, use_regex: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ASCII with two merges, whose text is split by the steps in `before`."""
    specials = ["<pad>", "<s>", "</s>"]
    tokens = [*specials, "Ġ", *(chr(code) for code in range(33, 127)), "ab", "ba"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)}, merges=[("a", "b"), ("b", "a")]
        )
    )
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def split(pattern: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stock Llama and the file made of it."""
    model = convert_tiny(make_tiny_llama(attention_bias=True), kv_floats=14, gauge="applied")
    exported = to_llama(model).to(request.param)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(exported, byte_level_tokenizer(), path, None, None, "tiny")
    return exported, path


def test_transformers_reads_the_same_model(written) -> None:
    """But for the table of frequencies, which it leaves aside."""
    exported, path = written
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    assert read.config.num_key_value_heads == 1
    assert read.config.head_dim == exported.config.head_dim
    found = read.state_dict()
    for name, tensor in copy.deepcopy(exported).float().state_dict().items():
        if not name.endswith("proj.bias"):  # which it does not read for this architecture
            torch.testing.assert_close(found[name], tensor, atol=0, rtol=0, msg=name)


def test_the_table_of_frequencies_is_in_the_file(written) -> None:
    exported, path = written
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    factors = torch.tensor(tensors[ROPE_FREQS].data)
    half = exported.config.head_dim // 2
    base = exported.config.rope_parameters["rope_theta"]
    turning = base ** (-torch.arange(half) / half) / factors
    rotary = LlamaRotaryEmbedding(exported.config)
    torch.testing.assert_close(turning, rotary.inv_freq, atol=0, rtol=1e-5)
    assert (factors - 1).abs().max() > 0.1, "a plain table would do"
    fields = gguf.GGUFReader(path).fields
    assert not [name for name in fields if "rope.scaling" in name]


def test_llama_cpp_computes_the_same(written) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    exported, path = written
    tokens = random_blocks(vocab_size=90, count=1, length=24, seed=5)
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    engine = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, **exact
    )
    engine.eval(tokens[0].tolist())
    found = torch.tensor(engine.scores[: tokens.shape[1]])
    expected = copy.deepcopy(exported).float()(tokens).logits[0]
    tolerance = 1e-3 if exported.dtype == torch.float32 else 5e-2  # it computes in bf16, too
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_tokenizer_reads_text_as_before(written) -> None:
    _, path = written
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    own = byte_level_tokenizer()
    for text in ("a cab, in 1999", "ab ba"):
        assert read(text)["input_ids"] == own(text)["input_ids"]
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert not fields["tokenizer.ggml.add_bos_token"].contents()


LLAMA3, QWEN2 = PRE_BY_PATTERN


@pytest.mark.parametrize(
    ("before", "use_regex", "name"),
    [
        ([], True, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True)], True, "smollm"),
        (split(LLAMA3), False, "llama-bpe"),
        (split(QWEN2), False, "qwen2"),
    ],
)
def test_how_text_is_split_is_recognised(tmp_path: Path, before, use_regex, name) -> None:
    exported = to_llama(convert_tiny(make_tiny_llama(), kv_floats=14))
    path = tmp_path / "tiny.gguf"
    tokenizer = byte_level_tokenizer(*before, use_regex=use_regex)
    check_tokenizer(tokenizer, None, None)
    write_gguf(exported, tokenizer, path, None, None, "tiny")
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name


def test_tokenizers_that_are_not_known_are_refused() -> None:
    unknown = byte_level_tokenizer(*split(r"\p{L}+"), use_regex=False)
    with pytest.raises(UserError, match=r"give llama\.cpp's name of it, `tokenizer_pre`"):
        check_tokenizer(unknown, None, None)
    check_tokenizer(unknown, None, "mine")
    with pytest.raises(UserError, match=r"only byte-level BPE .* convert from a \.gguf file"):
        check_tokenizer(make_tiny_tokenizer(), None, None)


def test_the_tokenizer_of_a_gguf_source_is_copied(tmp_path: Path) -> None:
    exported = to_llama(convert_tiny(make_tiny_llama(), kv_floats=14))
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    unknown = byte_level_tokenizer(*split(r"\p{L}+"), use_regex=False)
    write_gguf(exported, unknown, first, None, "mine", "tiny")
    provenance = {"source": {"id": str(first), "gguf_file": first.name}}
    check_tokenizer(make_tiny_tokenizer(), provenance, None)
    write_gguf(exported, make_tiny_tokenizer(), second, provenance, None, "tiny")
    fields = [gguf.GGUFReader(path).fields for path in (first, second)]
    names = [name for name in fields[0] if name.startswith("tokenizer.")]
    assert len(names) > 5
    for name in names:
        assert fields[1][name].contents() == fields[0][name].contents()
