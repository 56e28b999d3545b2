"""Loading sources, and one precise line for everything that can be wrong with one."""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    IncompleteSnapshotError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.utils import logging

from tests.conftest import make_tiny_llama
from tpa_convert.errors import UserError
from tpa_convert.places import models as places
from tpa_convert.sources import checkpoint as checkpoint_module
from tpa_convert.sources import load_source, read_source_config
from tpa_convert.sources import tokenizer as tokenizer_module
from tpa_convert.sources.tokenizer import puts_bos


@pytest.fixture(autouse=True)
def no_unexpected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def fails(spec: Any, *parts: str, **options: Any) -> None:
    """Loading fails with one line that names the source and contains all `parts`."""
    with pytest.raises(UserError) as raised:
        load_source(spec, **options)
    message = str(raised.value)
    assert message.startswith(f"{spec}")
    assert "\n" not in message
    assert len(message) < 600
    for part in parts:
        assert part in message


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestLoading:
    def test_model_comes_back_as_saved(
        self, tiny_source_model: LlamaForCausalLM, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        directory = tiny_checkpoint(tiny_source_model)
        source = load_source(directory)
        expected = tiny_source_model.state_dict()
        found = source.model.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert not source.model.training
        assert not any(parameter.requires_grad for parameter in source.model.parameters())
        assert source.family.model_type == "llama"
        assert source.tokenizer.decode(source.tokenizer("Hello, world").input_ids) == "Hello, world"

    @pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
    def test_attention_of_the_config_does_not_matter(
        self, attention: str, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        """Layers are calibrated without a mask, which is causal under SDPA alone."""
        directory = tiny_checkpoint()
        edit_config(directory, attn_implementation=attention, _attn_implementation=attention)
        assert load_source(directory).model.config._attn_implementation == "sdpa"

    def test_a_config_without_a_type_has_that_of_the_weights(
        self, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        directory = tiny_checkpoint(make_tiny_llama().bfloat16())
        path = directory / "config.json"
        config = json.loads(path.read_text())
        del config["dtype"]
        path.write_text(json.dumps(config))
        assert read_source_config(directory).dtype == torch.bfloat16

    def test_reference_says_where_it_came_from(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        reference = load_source(directory).reference
        content = (directory / "model.safetensors").read_bytes()
        assert asdict(reference) == {
            "id": str(directory.resolve()),
            "revision": None,
            "sha256": hashlib.sha256(content).hexdigest(),
            "gguf_file": None,
        }
        assert json.loads(json.dumps(asdict(reference))) == asdict(reference)

    def test_hash_covers_all_shards_in_order(self, tmp_path: Path) -> None:
        make_tiny_llama().save_pretrained(tmp_path, max_shard_size="8KB")
        shards = sorted(tmp_path.glob("*.safetensors"))
        assert len(shards) > 2
        found = checkpoint_module.find_checkpoint(tmp_path).sha256()
        assert found == hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype(self, tiny_checkpoint: Callable[..., Path], dtype: torch.dtype) -> None:
        source = load_source(tiny_checkpoint(), dtype=dtype)
        assert {parameter.dtype for parameter in source.model.parameters()} == {dtype}

    def test_tied_embeddings_are_no_missing_tensor(
        self, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        model = load_source(tiny_checkpoint(make_tiny_llama(tie_word_embeddings=True))).model
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_loading_is_silent_and_leaves_the_log_as_it_was(
        self, tiny_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
    ) -> None:
        directory = tiny_checkpoint()
        capfd.readouterr()
        before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
        load_source(directory)
        assert capfd.readouterr() == ("", "")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before

    def test_config_alone_needs_no_weights(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        (directory / "model.safetensors").unlink()
        assert read_source_config(directory).num_hidden_layers == 2

    def test_tensors_without_a_place_are_warned_about(
        self, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        directory = tiny_checkpoint()
        path = directory / "model.safetensors"
        save_file(
            {**load_file(path), "model.extra.weight": torch.ones(2)},
            path,
            metadata={"format": "pt"},
        )
        with pytest.warns(UserWarning, match=r"1 tensors .*model\.extra\.weight"):
            load_source(directory)


class TestPaths:
    @pytest.mark.parametrize(
        "spec", ["/no/such/model", "./model", "~/no-model-here", "x/y/z", "a b"]
    )
    def test_missing_path(self, spec: str) -> None:
        fails(spec, "no such file or directory", "give an existing path or a Hub id")

    def test_missing_gguf(self, tmp_path: Path) -> None:
        fails(tmp_path / "model.gguf", "no such file or directory")

    def test_slip_in_a_path_is_not_taken_for_a_hub_id(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "models").mkdir()
        monkeypatch.chdir(tmp_path)
        fails("models/llama", "no such file or directory")

    def test_a_file_that_is_no_checkpoint(self, tiny_checkpoint: Callable[..., Path]) -> None:
        fails(tiny_checkpoint() / "model.safetensors", "this is a file; give the directory")

    def test_revision_of_a_path(self, tiny_checkpoint: Callable[..., Path]) -> None:
        fails(tiny_checkpoint(), "revision", "leave it out", revision="main")

    def test_empty_directory(self, tmp_path: Path) -> None:
        fails(tmp_path, "no config.json", "give the directory of a transformers checkpoint")

    def test_directory_with_gguf_names_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").touch()
        fails(tmp_path, "name it", str(tmp_path / "model.gguf"))

    def test_adapter(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        fails(tmp_path, "adapter", "merge it into its base model")

    @pytest.mark.parametrize("text", ["{", "[]", "\x00"])
    def test_bad_config(self, tiny_checkpoint: Callable[..., Path], text: str) -> None:
        directory = tiny_checkpoint()
        (directory / "config.json").write_text(text)
        fails(directory, "config.json", "download it again")

    def test_config_with_impossible_values(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        edit_config(directory, num_attention_heads="many")
        fails(directory, "num_attention_heads")

    @pytest.mark.parametrize(
        ("content", "package"), [(b"\n\x0e\n\x05<unk>", "sentencepiece"), (b"IQ== 0", "tiktoken")]
    )
    def test_a_tokenizer_whose_package_is_missing(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, package: str
    ) -> None:
        make_tiny_llama().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.model").write_bytes(content)
        monkeypatch.setattr(tokenizer_module, "_is_installed", lambda module: module != package)
        fails(tmp_path, f"needs {package}: pip install {package}", "tokenizer.json")
        monkeypatch.setattr(tokenizer_module, "_is_installed", lambda module: True)
        fails(tmp_path, "the tokenizer cannot be loaded")

    def test_missing_tokenizer(self, tmp_path: Path) -> None:
        make_tiny_llama().save_pretrained(tmp_path)
        fails(tmp_path, "tokenizer cannot be loaded", "beside the weights")


class TestHub:
    """The Hub is never reached: tests run with HF_HUB_OFFLINE=1."""

    @pytest.fixture(autouse=True)
    def empty_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("load", [load_source, read_source_config])
    def test_unknown_model_offline(self, load: Callable[..., Any]) -> None:
        with pytest.raises(UserError) as raised:
            load("some-org/some-model-that-is-not-cached")
        message = str(raised.value)
        assert message.startswith("some-org/some-model-that-is-not-cached: ")
        assert "the Hub cannot be reached" in message
        assert "give a local directory" in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (RepositoryNotFoundError, ("no such model on the Hub", "check the name")),
            (RevisionNotFoundError, ("at revision v9", "no such revision")),
            (GatedRepoError, ("grants access on request", "hf auth login")),
        ],
    )
    def test_what_the_hub_answers(
        self, monkeypatch: pytest.MonkeyPatch, error: type[Exception], words: tuple[str, ...]
    ) -> None:
        def refuse(*args: Any, **kwargs: Any) -> str:
            raise error.__new__(error)  # their constructors want an HTTP response

        monkeypatch.setattr(places, "snapshot_download", refuse)
        fails("some-org/model", *words, revision="v9")

    def test_no_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> str:
            raise OSError("network is unreachable")

        monkeypatch.setattr(places, "snapshot_download", refuse)
        fails("some-org/model", "the Hub cannot be reached", "connection")

    def test_no_room_for_the_download(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(places, "snapshot_download", refuse)
        fails("some-org/model", "the Hub's cache (No space left on device)", "HF_HOME")

    def test_a_cached_snapshot_is_used_as_far_as_it_is_there(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tiny_checkpoint: Callable[..., Path],
    ) -> None:
        directory = tiny_checkpoint(name="0123abc")

        def offline(*args: Any, **kwargs: Any) -> str:
            raise IncompleteSnapshotError("2 files are missing", str(directory))

        monkeypatch.setattr(places, "snapshot_download", offline)
        assert load_source("some-org/model").reference.revision == "0123abc"
        (directory / "model.safetensors").unlink()
        assert read_source_config("some-org/model").model_type == "llama"
        fails("some-org/model", "no model.safetensors", "download")
        (directory / "config.json").unlink()
        fails("some-org/model", "the Hub cannot be reached")

    def test_templates_are_downloaded_and_other_folders_are_not(self) -> None:
        wanted = [
            "config.json",
            "model-00001-of-00002.safetensors",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
        ]
        others = ["onnx/config.json", "models/other.safetensors", "original/tokenizer.model"]
        kept = filter_repo_objects(
            [*wanted, *others, "pytorch_model.bin"],
            allow_patterns=list(checkpoint_module._HUB_FILES),
            ignore_patterns=list(checkpoint_module._HUB_NOT),
        )
        assert list(kept) == wanted

    def test_a_snapshot_is_a_directory_with_a_commit(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        tiny_checkpoint: Callable[..., Path],
    ) -> None:
        asked: list[dict[str, Any]] = []
        directory = tiny_checkpoint(name="0123abc")

        def download(repo_id: str, **options: Any) -> str:
            asked.append({"repo_id": repo_id, **options})
            return str(directory)

        monkeypatch.setattr(places, "snapshot_download", download)
        source = load_source("some-org/model", revision="main")
        assert source.reference.id == "some-org/model"
        assert source.reference.revision == "0123abc"
        assert asked[0]["repo_id"] == "some-org/model"
        assert asked[0]["revision"] == "main"
        # Neither pickles nor code are so much as downloaded.
        assert not any(pattern.endswith((".bin", ".py")) for pattern in asked[0]["allow_patterns"])


class TestWeights:
    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated(self, tiny_checkpoint: Callable[..., Path], keep: int) -> None:
        directory = tiny_checkpoint()
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        fails(directory, "model.safetensors is truncated or damaged", "download it again")

    def test_git_lfs_pointer(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        (directory / "model.safetensors").write_text("version https://git-lfs.example/spec/v1\n")
        fails(directory, "Git LFS pointer", "git lfs pull")

    def test_missing_shard(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        (directory / "model.safetensors").unlink()
        make_tiny_llama().save_pretrained(directory, max_shard_size="8KB")
        sorted(directory.glob("*.safetensors"))[1].unlink()
        fails(directory, "model-00002-of-", "is missing", "download it again")

    def test_bad_index(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text("{}")
        fails(directory, "model.safetensors.index.json cannot be read")

    def test_no_weights(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        (directory / "model.safetensors").unlink()
        fails(directory, "no model.safetensors", "save_pretrained")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
    def test_pickle_only_is_refused_unread(
        self, tiny_checkpoint: Callable[..., Path], tmp_path: Path, name: str
    ) -> None:
        directory = tiny_checkpoint()
        (directory / "model.safetensors").unlink()
        torch.save({"trap": Trap(str(tmp_path / "sprung"))}, directory / name)
        fails(directory, "pickled", "save_pretrained")
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_that_are_not_finite(
        self, tiny_checkpoint: Callable[..., Path], value: float, dtype: torch.dtype
    ) -> None:
        model = make_tiny_llama()
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
        directory = tiny_checkpoint(model)
        fails(
            directory,
            "model.layers.1.mlp.up_proj.weight contains NaN or infinity",
            "use another",
            dtype=dtype,
        )

    def test_missing_tensor(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        path = directory / "model.safetensors"
        tensors = load_file(path)
        del tensors["model.layers.0.self_attn.k_proj.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
        fails(directory, "1 of the model's tensors", "model.layers.0.self_attn.k_proj.weight")

    def test_weights_of_another_shape(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        edit_config(directory, intermediate_size=80)
        fails(directory, "its config fits its weights")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


class TestKinds:
    @pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes"])
    def test_quantised(self, tiny_checkpoint: Callable[..., Path], method: str) -> None:
        directory = tiny_checkpoint()
        edit_config(directory, quantization_config={"quant_method": method})
        fails(directory, f"quantised ({method})", "de-quantise", "16-bit checkpoint")
        with pytest.raises(UserError, match="quantised"):
            read_source_config(directory)

    @pytest.mark.parametrize(
        "changes",
        [
            {"quantization": {"group_size": 64, "bits": 4}},
            {"quantization_config": "4 bits"},
            {"text_config": {"quantization_config": {"quant_method": "4 bits"}}},
            {"compression_config": {"bits": 4}},
        ],
    )
    def test_quantised_in_other_words(self, tiny_checkpoint, changes: dict[str, Any]) -> None:
        directory = tiny_checkpoint()
        load_source(directory)
        edit_config(directory, **changes)
        fails(directory, "quantised (4 bits)", "16-bit checkpoint")

    def test_an_unknown_type_of_rope(self, tiny_checkpoint) -> None:
        directory = tiny_checkpoint()
        for rope in ({"rope_type": "spiral"}, {"full_attention": {"rope_type": "spiral"}}):
            edit_config(directory, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
            read_source_config(directory)
            edit_config(directory, rope_parameters={"rope_theta": 1e4, **rope})
            with pytest.raises(UserError, match="rope type 'spiral', which this") as raised:
                read_source_config(directory)
            assert "yarn" in str(raised.value)

    def test_quantised_by_a_file_beside_the_config(self, tiny_checkpoint) -> None:
        directory = tiny_checkpoint()
        (directory / "hf_quant_config.json").write_text("{}")
        fails(directory, "quantised (modelopt)")

    @pytest.mark.parametrize("ending", ["qweight", "SCB", "weight_packed", "weight_scale"])
    def test_packed_weights_that_the_config_does_not_mention(
        self, tiny_checkpoint, ending: str
    ) -> None:
        directory = tiny_checkpoint()
        path = directory / "model.safetensors"
        tensors = load_file(path)
        name = f"model.layers.0.self_attn.q_proj.{ending}"
        save_file(tensors | {name: torch.zeros(2, dtype=torch.int32)}, path, {"format": "pt"})
        fails(directory, f"quantised (as {name} tells)", "16-bit checkpoint")

    def test_fp8_weights_that_the_config_does_not_mention(
        self, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        directory = tiny_checkpoint()
        path = directory / "model.safetensors"
        name = "model.layers.0.mlp.up_proj.weight"
        tensors = load_file(path)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        save_file(tensors, path, metadata={"format": "pt"})
        fails(directory, "quantised (fp8)")

    def test_no_rotary_embedding(self, tiny_checkpoint: Callable[..., Path]) -> None:
        config = GPT2Config(vocab_size=128, n_embd=16, n_layer=1, n_head=2, n_positions=16)
        fails(tiny_checkpoint(GPT2LMHeadModel(config)), "gpt2 has no rotary position embedding")

    def test_mla(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        edit_config(directory, model_type="deepseek_v3")
        fails(directory, "MLA")

    def test_tpa(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        edit_config(directory, model_type="tpa")
        fails(directory, "TPA model already", "convert the model it was made from")

    def test_type_unknown_to_transformers(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        edit_config(directory, model_type="no-such-type")
        fails(directory, "'no-such-type' is unknown to transformers", "upgrade")

    def test_no_model_type(self, tiny_checkpoint: Callable[..., Path]) -> None:
        directory = tiny_checkpoint()
        edit_config(directory, model_type=None)
        fails(directory, "model_type", "save_pretrained")

    def test_code_in_a_checkpoint_runs_only_when_allowed(
        self, tiny_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        directory = tiny_checkpoint()
        edit_config(directory, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
        (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        fails(directory, "its own code", "--trust-remote-code")
        assert not (tmp_path / "ran").exists()


class TestGGUF:
    @pytest.fixture
    def gguf_file(self, tmp_path: Path) -> Path:
        path = tmp_path / "tiny.gguf"
        write_gguf(make_tiny_llama(tie_word_embeddings=True), path)
        return path

    def test_same_logits_as_the_model_it_holds(
        self, gguf_file: Path, random_tokens: Callable[..., torch.Tensor], tmp_path: Path
    ) -> None:
        source = load_source(gguf_file)
        model = make_tiny_llama(tie_word_embeddings=True)
        tokens = random_tokens(2, 12)
        torch.testing.assert_close(source.model(tokens).logits, model(tokens).logits)
        assert source.reference.gguf_file == "tiny.gguf"
        assert source.reference.id == str(gguf_file.resolve())
        digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
        assert source.reference.sha256 == digest
        assert (source.tokenizer.bos_token, source.tokenizer.eos_token) == ("<s>", "</s>")
        # What was read from GGUF can be saved like any other model.
        source.model.save_pretrained(tmp_path / "saved")
        source.tokenizer.save_pretrained(tmp_path / "saved")
        saved = load_source(tmp_path / "saved")
        assert torch.equal(saved.model(tokens).logits, source.model(tokens).logits)

    @pytest.mark.parametrize("begins", [True, False])
    def test_texts_begin_as_the_file_says(self, tmp_path: Path, begins: bool) -> None:
        """Releases of transformers differ in what they make of it."""
        path = tmp_path / "tiny.gguf"
        write_gguf(make_tiny_llama(), path, begins=begins)
        tokenizer = load_source(path).tokenizer
        assert (tokenizer("a text")["input_ids"][0] == tokenizer.bos_token_id) == begins
        assert puts_bos(tokenizer) == begins
        tokenizer.save_pretrained(tmp_path / "saved")
        assert puts_bos(AutoTokenizer.from_pretrained(tmp_path / "saved")) == begins

    def test_loading_is_silent(self, gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
        load_source(gguf_file)
        assert capfd.readouterr() == ("", "")

    def test_config_alone(self, gguf_file: Path) -> None:
        assert read_source_config(gguf_file).num_key_value_heads == 2

    def test_not_gguf(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(b"something else entirely")
        fails(path, "not a GGUF file")

    @pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9])
    def test_truncated(self, gguf_file: Path, share: float) -> None:
        content = gguf_file.read_bytes()
        gguf_file.write_bytes(content[: max(4, int(share * len(content)))])
        fails(gguf_file, "cannot load this GGUF file", "complete")

    def test_one_of_several_parts(self, tmp_path: Path) -> None:
        def number(key: bytes, value: int) -> bytes:
            name = len(key).to_bytes(8, "little") + key
            return name + (2).to_bytes(4, "little") + value.to_bytes(2, "little")

        path = tmp_path / "model-00002-of-00003.gguf"
        path.write_bytes(b"GGUF" + number(b"split.no", 1) + number(b"split.count", 3))
        fails(path, "part 2 of 3", "llama-gguf-split --merge")
        path.write_bytes(b"GGUF" + number(b"split.no", 0) + number(b"split.count", 1))
        with pytest.raises(UserError) as raised:  # a file that was merged from parts
            load_source(path)
        assert "merge" not in str(raised.value)

    def test_lost_rope_scaling_is_warned_about(self, tmp_path: Path) -> None:
        path = tmp_path / "scaled.gguf"
        write_gguf(make_tiny_llama(), path, rope_factors=True)
        with pytest.warns(UserWarning, match="does not read the RoPE scaling"):
            read_source_config(path)

    def test_package_missing(self, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checkpoint_module, "is_gguf_available", lambda: False)
        fails(gguf_file, "pip install 'tpa-convert[gguf]'")


def write_gguf(
    model: LlamaForCausalLM, path: Path, rope_factors: bool = False, begins: bool | None = None
) -> None:
    """Writes an fp32 GGUF as llama.cpp would: its names, and its order of rows in q and k."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    characters = [chr(0x100 + code) for code in range(config.vocab_size - 5)]
    merges = [characters[0:2], characters[2:4]]
    tokens = ["<unk>", "<s>", "</s>", *characters, *("".join(pair) for pair in merges)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if begins is not None:
        writer.add_add_bos_token(begins)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer, block in enumerate(model.model.layers):
        for module, name in names.items():
            weight = block.get_submodule(module).weight
            if name in ("attn_q", "attn_k"):
                # llama.cpp rotates neighbours, transformers halves
                weight = (
                    weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
                )
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight.contiguous().numpy())
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.numpy())
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", model.lm_head.weight.numpy())
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", torch.ones(config.head_dim // 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
