"""Architectures of one's own: what is missing is listed, what is wrong is named, code travels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from tests.command_line import CONVERT, error_of, save_text, tpa_convert
from tests.conftest import make_tiny_tokenizer
from tests.conversions import convert_tiny, random_blocks
from tests.exports import SCRIPT
from tests.tiny_models import CONFIGS, SIZES, random_model
from tpa_convert.conversion.probe import _small_model, probe
from tpa_convert.errors import UserError
from tpa_convert.families import Family, family_of, register_family
from tpa_convert.families.own_code import import_file
from tpa_convert.modeling import CAUSAL_LMS, AttentionNames

HEAL = ["--tokens", 512, "--tokens-per-step", 256, "--block-length", 32]
EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_architecture.py"


@pytest.fixture(scope="module", autouse=True)
def example() -> Iterator[Any]:
    import_file(EXAMPLE)
    yield sys.modules["custom_architecture"]
    sys.path.remove(str(EXAMPLE.parent))


@pytest.fixture
def checkpoint(tmp_path: Path, example: Any) -> Path:
    torch.manual_seed(0)
    example.SmallForCausalLM(example.SmallConfig()).save_pretrained(tmp_path / "source")
    make_tiny_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


# ------------------------------------------------------------------------------ the example


def test_the_example_runs() -> None:
    result = subprocess.run(
        [sys.executable, EXAMPLE],
        env=os.environ | {"PYTHONPATH": str(EXAMPLE.parents[1])},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    whole, quarter = result.stdout.strip().splitlines()
    assert whole.startswith("384 -> 384 bytes")
    before, _, after = quarter.split()[:3]
    assert int(before) == 384
    assert 80 < int(after) <= 96
    assert float(whole.split()[-1]) < 1e-4 < float(quarter.split()[-1])


def test_the_page_shows_the_example_as_it_is() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "custom-architectures.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert any(block and block in EXAMPLE.read_text() for block in blocks)
    record = next(block for block in blocks if "register_family(" in block)
    assert record.strip() in EXAMPLE.read_text()
    assert (EXAMPLE.parent / "small_model.py").name in page


@pytest.mark.parametrize("key_cache", ["rotated", "latent"])
def test_it_is_exact_and_cached(example, key_cache) -> None:
    model = random_model(example.SmallForCausalLM, example.SmallConfig())
    tokens = random_blocks(count=2, length=20)
    expected = model(tokens).logits
    converted = convert_tiny(model, key_cache=key_cache)
    torch.testing.assert_close(converted(tokens).logits, expected, atol=1e-4, rtol=0)
    for one in (model, converted):
        one.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(
        converted.generate(tokens[:1], **settings), model.generate(tokens[:1], **settings)
    )
    narrow = convert_tiny(model, key_cache=key_cache, kv_ratio=0.5)
    assert (narrow(tokens).logits - expected).abs().max() > 1e-2


def test_every_command_takes_it(checkpoint: Path, tmp_path: Path) -> None:
    own, out, text = ("--import", EXAMPLE), tmp_path / "out", save_text(tmp_path / "a.txt")
    for arguments in (
        ["plan", checkpoint, *CONVERT, "--out", tmp_path / "plan.yaml"],
        ["convert", checkpoint, *CONVERT, "--out", out],
        ["heal", out, "--text", text, "--out", tmp_path / "healed", *HEAL],
        ["eval", out, "--text", text, "--no-speed", "--block-length", 32],
        ["generate", out, "words", "--max-new-tokens", 3],
    ):
        result = tpa_convert(*arguments, *own)
        assert result.exit_code == 0, (arguments[0], result.output, result.exception)


def test_its_code_travels_with_the_export(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tpa_convert("convert", checkpoint, *CONVERT, "--out", out).exit_code == 0
    assert (out / "small_model.py").read_text() == (EXAMPLE.parent / "small_model.py").read_text()
    assert not (out / "custom_architecture.py").exists()
    tokens = random_blocks(count=2, length=20)
    torch.save(tokens, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", SCRIPT, tmp_path / "tokens.pt", tmp_path / "results.pt", out]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=200)
    ((module, found),) = torch.load(tmp_path / "results.pt", weights_only=True)
    assert module.startswith("transformers_modules.")
    family = family_of(sys.modules["small_model"].SmallConfig())
    expected = family.causal_lm.from_pretrained(out)(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    (out / "small_model.py").unlink()
    environment["HF_MODULES_CACHE"] = str(tmp_path / "others")
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode


def test_without_its_description_the_page_is_named(checkpoint: Path, tmp_path: Path) -> None:
    script = "from tpa_convert.cli.commands import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", script, "convert", checkpoint, *CONVERT, "--out", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(EXAMPLE.parents[1])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 1
    assert "'small' is unknown" in result.stderr
    assert "--import (docs/custom-architectures.md)" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "--import: no such file"),
        ("1 / 0", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("def f(:", "cannot be imported (SyntaxError"),
        (
            "from tpa_convert.errors import UserError\nraise UserError('so it is')",
            "mine.py: so it is",
        ),
    ],
)
def test_files_that_cannot_be_imported(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    arguments = ["--kv-ratio", 0.5, "--dry-run", "--import", tmp_path / "mine.py"]
    result = tpa_convert("convert", tmp_path, *arguments)
    assert words in error_of(result)


# ------------------------------------------------------------------------- names and shapes


def register(example: Any, **changes: Any) -> Family:
    names = replace(family_of(example.SmallConfig()).names, **changes)
    classes = example.SmallConfig, example.SmallModel, example.SmallForCausalLM
    try:
        return register_family(*classes, names)
    except UserError:
        register_family(*classes, family_of(example.SmallConfig()).names)
        raise


def test_all_that_is_missing_is_listed_at_once(example) -> None:
    with pytest.raises(UserError) as raised:
        register(example, query="q", value="v", output="o", rotary="turn")
    message = str(raised.value)
    for words in (
        "SmallModel has no turn (it has embedding, rope, blocks, norm)",
        "SmallAttention has no q, v, o (it has query, key, value, out)",
        "docs/custom-architectures.md",
    ):
        assert words in message
    assert message.count("SmallAttention") == 1
    assert "\n" not in message


def test_shapes_are_checked_before_any_weights_are_there(example) -> None:
    with pytest.raises(UserError) as raised:
        register(example, query="key", key="query")
    message = str(raised.value)
    assert "SmallAttention.key has a weight of (32, 64)" in message
    assert "SmallAttention.query has a weight of (64, 64)" in message


# --------------------------------------------------------------------------------- the probe


@pytest.mark.parametrize("name", CONFIGS)
def test_the_package_s_own_families_pass(name: str) -> None:
    config = CONFIGS[name]()
    probe(family_of(config), config)


def described(
    names: AttentionNames, base: str = "llama", key_norm: bool = False
) -> tuple[Family, Any]:
    """A family whose record is another than that of the package's own."""
    cls = CAUSAL_LMS[base]
    decoder = type("Decoder", (cls.decoder_class,), {"attention_names": names})

    def init(self: Any, config: Any) -> None:
        source.__init__(self, config)
        setattr(self, source.base_model_prefix, decoder(config))
        self.post_init()

    source = cls.__bases__[-1]
    bases = cls.__bases__
    converted = type("Converted", bases, {"decoder_class": decoder, "__init__": init})
    converted.config_class = cls.config_class
    config = LlamaConfig(**SIZES, head_dim=8) if base == "llama" else CONFIGS[base]()
    return Family(base, converted=converted, key_norm=key_norm), config


@pytest.mark.parametrize(
    ("base", "names", "wrong"),
    [
        ("llama", AttentionNames(pairs="neighbours"), "pairs='halves'"),
        ("llama", AttentionNames(table="neighbours"), "table='halves'"),
        ("cohere", AttentionNames(), "pairs='neighbours', table='neighbours'"),
        (
            "llama",
            AttentionNames(key="v_proj", value="k_proj"),
            "key='k_proj', value='v_proj'",
        ),
        (
            "gpt_neox",
            AttentionNames(attention="attention", fused="query_key_value", output="dense"),
            "fused_by_head=True",
        ),
        ("qwen3", AttentionNames(query_norm="a", key_norm="b"), "query_norm='q_norm'"),
    ],
)
def test_the_wrong_field_is_named(base: str, names: AttentionNames, wrong: str) -> None:
    family, config = described(names, base)
    with pytest.raises(UserError, match=re.escape(wrong)) as raised:
        probe(family, config)
    assert "\n" not in str(raised.value)
    right = CAUSAL_LMS[base].decoder_class.attention_names
    family, config = described(right, base, key_norm=base == "qwen3")
    probe(family, config)


@pytest.mark.parametrize("name", ["LlamaConfig", "PhiConfig", "Olmo2Config", "Gemma2Config"])
def test_large_models_are_probed_by_small_ones(name: str) -> None:
    config = getattr(transformers, name)()
    family = family_of(config)
    small = _small_model(family, config)
    assert small.config.num_attention_heads == 4 < config.num_attention_heads
    assert small.config.hidden_size < config.hidden_size
    probe(family, config)


def test_what_follows_from_the_heads_is_kept_with_them() -> None:
    config = Stubborn(**SIZES | {"num_attention_heads": 8}, head_dim=8)
    assert _small_model(family_of(config), config).config.num_attention_heads == 8
    config = LlamaConfig(**SIZES | {"num_attention_heads": 8}, head_dim=8)
    assert _small_model(family_of(config), config).config.num_attention_heads == 4


class Stubborn(LlamaConfig):
    """Takes no other number of heads than its own."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_attention_heads != 8:
            raise ValueError("no such model")


class Scaled(LlamaAttention):
    """Does something that no record can say."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return 2 * output.tanh(), weights


class ScaledConfig(LlamaConfig):
    model_type = "scaled"


class ScaledModel(LlamaModel):
    config_class = ScaledConfig

    def __init__(self, config: Any):
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            layer.self_attn = Scaled(config, i)
        self.post_init()


class ScaledForCausalLM(LlamaForCausalLM):
    config_class = ScaledConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = ScaledModel(config)
        self.post_init()


class Positional(nn.Module):
    """A layer that calls its attention in another way."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.self_attn, self.norm = layer.self_attn, layer.input_layernorm

    def forward(self, hidden_states: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        output, _ = self.self_attn(self.norm(hidden_states), (cos, sin), None, None)
        return hidden_states + output


class PositionalConfig(LlamaConfig):
    model_type = "positional"


class PositionalModel(LlamaModel):
    config_class = PositionalConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.layers = nn.ModuleList(map(Positional, self.layers))
        self.post_init()


class PositionalForCausalLM(LlamaForCausalLM):
    config_class = PositionalConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = PositionalModel(config)
        self.post_init()


@pytest.mark.filterwarnings("ignore:.*imports tpa_convert")
@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ((ScaledConfig, ScaledModel, ScaledForCausalLM), "something that the record cannot say"),
        (
            (PositionalConfig, PositionalModel, PositionalForCausalLM),
            "cannot run with a converted attention",
        ),
    ],
)
def test_what_no_record_can_say_is_refused(classes: Any, words: str) -> None:
    config = classes[0](**SIZES, head_dim=8)
    family = register_family(*classes, example=config)
    with pytest.raises(UserError, match=words):
        probe(family, config)


def test_classes_that_do_not_belong_together_are_told(example) -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM has another config_class than Small"):
        register_family(example.SmallConfig, example.SmallModel, LlamaForCausalLM)


def test_code_that_could_not_travel_is_warned_about(example) -> None:
    with pytest.warns(UserWarning, match="test_custom_architectures.py .* imports tpa_convert"):
        register_family(ScaledConfig, ScaledModel, ScaledForCausalLM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register(example)
