"""Models of the Hub, and models for it: what goes along, what is asked first, what is lost."""

from __future__ import annotations

import os
import shlex
import shutil
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    Response,
)
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from tests.command_line import CONVERT, error_of, save_source, save_text, tpa_convert
from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tpa_convert.errors import UserError
from tpa_convert.export import hub
from tpa_convert.export.hub import check_repository, upload

COMMIT = "0123456789abcdef" * 2 + "01234567"
TRAINING = ["--tokens", 64, "--tokens-per-step", 32, "--block-length", 16]
USER: dict[str, Any] = {
    "name": "ada",
    "orgs": [{"name": "engines"}],
    "auth": {"accessToken": {"role": "write"}},
}


class FakeHub:
    """Stands in for HfApi: notes what it is asked, and keeps what it is given.

    Attributes:
        user: what it knows of the token, or the error that it answers with.
        files: of the repositories that it has.
        failure: raised by an upload.
    """

    def __init__(self) -> None:
        self.user: dict[str, Any] | Exception = USER
        self.files: dict[str, set[str]] = {}
        self.private: dict[str, bool | None] = {}
        self.failure: Exception | None = None
        self.asked: list[str] = []

    def whoami(self) -> dict[str, Any]:
        self.asked.append("whoami")
        if isinstance(self.user, Exception):
            raise self.user
        return self.user

    def repo_exists(self, repo_id: str) -> bool:
        return repo_id in self.files

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return filename in self.files[repo_id]

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        self.asked.append("create_repo")
        assert exist_ok
        self.files.setdefault(repo_id, set())
        self.private[repo_id] = private
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        commit_message: str,
        delete_patterns: str | None,
    ) -> None:
        self.asked.append("upload_folder")
        if self.failure is not None:
            raise self.failure
        if delete_patterns == "*":
            self.files[repo_id] = set()
        self.files[repo_id] |= {path.name for path in folder_path.iterdir()}


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    return fake


def answer(status: int) -> HfHubHTTPError:
    client = import_module(Response.__module__.partition(".")[0])
    request = client.Request("GET", "https://huggingface.co/api/whoami-v2")
    return HfHubHTTPError("no", response=Response(status, request=request))


# ------------------------------------------------------------------------------- uploading


def test_what_is_converted_and_healed_is_uploaded(fake_hub: FakeHub, tmp_path: Path) -> None:
    source, text = save_source(tmp_path / "source"), save_text(tmp_path / "text.txt")
    (source / "LICENSE").write_text("As you like it.")
    out, healed = tmp_path / "out", tmp_path / "healed"
    result = tpa_convert("convert", source, *CONVERT, "--out", out, "--push-to", "small")
    assert result.exit_code == 0, result.output
    assert "Uploaded to https://huggingface.co/ada/small" in result.stdout
    assert fake_hub.asked == ["whoami", "create_repo", "upload_folder"]
    assert fake_hub.private == {"ada/small": None}
    expected = {"config.json", "model.safetensors", "README.md", "tpa_convert.json", "LICENSE"}
    assert expected < fake_hub.files["ada/small"] == {path.name for path in out.iterdir()}
    there = ["--push-to", "engines/small", "--private"]
    result = tpa_convert("heal", out, "--text", text, *TRAINING, "--out", healed, *there)
    assert result.exit_code == 0, result.output
    assert fake_hub.private["engines/small"] is True
    assert {*expected, "loss.png"} < fake_hub.files["engines/small"]


def test_nothing_is_lost_if_an_upload_fails(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.failure = HTTPError("the line\nis dead")
    source, out = save_source(tmp_path / "source"), tmp_path / "out put"
    options = [*CONVERT, "--push-to", "small", "--private"]
    said = error_of(tpa_convert("convert", source, *options, "--out", out))
    assert f"{out} is complete, but was not uploaded to ada/small (the line is dead)" in said
    again = shlex.split(said.partition("try again with: ")[2])
    assert again == ["hf", "upload", "ada/small", str(out), ".", "--private"]
    assert (out / "model.safetensors").is_file()
    fake_hub.failure = None
    assert upload(out, check_repository("small")) == "https://huggingface.co/ada/small"


def test_an_earlier_model_is_replaced_if_asked(fake_hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "new.safetensors").touch()
    fake_hub.files = {
        "ada/ours": {"config.json", "tpa_convert.json", "model-00001-of-00002.safetensors"},
        "ada/other": {"config.json", "model.safetensors"},
        "ada/empty": {".gitattributes"},
    }
    for name in ("ours", "other"):
        with pytest.raises(UserError, match=f"ada/{name} has a model on the Hub: .* --overwrite"):
            check_repository(name)
    with pytest.raises(UserError, match="ada/other was not written by tpa-convert"):
        check_repository("other", overwrite=True)
    upload(tmp_path, check_repository("ours", overwrite=True))
    assert fake_hub.files["ada/ours"] == {"new.safetensors"}
    upload(tmp_path, check_repository("empty", overwrite=True))
    assert fake_hub.files["ada/empty"] == {"new.safetensors", ".gitattributes"}


@pytest.mark.parametrize(
    ("user", "name", "words"),
    [
        (USER, "a b", "'a b' cannot be the name of a repository"),
        (USER, "a/b/c", "'a/b/c' cannot be the name of a repository"),
        (USER, "https://huggingface.co/ada/small", "cannot be the name of a repository"),
        (USER, "grace/small", "this token is of ada, who is no member of grace"),
        (USER | {"auth": {"accessToken": {"role": "read"}}}, "small", "can only read"),
        (
            LocalTokenNotFoundError("none"),
            "small",
            "needs a token for the Hub: run `hf auth login`",
        ),
        (answer(401), "small", "the Hub refuses the token"),
        (answer(503), "small", "the Hub answers with an error (503)"),
        (HTTPError("dead"), "small", "the Hub cannot be reached"),
        (ConnectionError("dead"), "small", "the Hub cannot be reached"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "heal"])
def test_what_is_in_the_way_is_told_before_any_work(
    fake_hub: FakeHub, tmp_path: Path, command: str, user: Any, name: str, words: str
) -> None:
    """Both models lack their files: work on them would end in another error."""
    fake_hub.user = user
    (tmp_path / "config.json").write_text('{"tpa_layers": []}')
    (tmp_path / "empty.txt").touch()
    options = {"convert": CONVERT, "heal": ["--text", tmp_path / "empty.txt"]}[command]
    arguments = [command, tmp_path, *options, "--out", tmp_path / "out"]
    said = error_of(tpa_convert(*arguments, "--push-to", name))
    assert words in said
    assert fake_hub.files == {}


def test_finer_tokens_may_write_elsewhere(fake_hub: FakeHub) -> None:
    fake_hub.user = USER | {"auth": {"accessToken": {"role": "fineGrained"}}}
    assert check_repository("grace/small").id == "grace/small"


def test_a_private_repository_has_a_name(tmp_path: Path) -> None:
    arguments = ["convert", tmp_path, *CONVERT, "--out", tmp_path / "out", "--private"]
    said = error_of(tpa_convert(*arguments))
    assert "--private is for the repository that --push-to makes" in said


def test_what_huggingface_hub_says_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No fake: tests run with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="needs a token for the Hub"):
        check_repository("small")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        check_repository("small")


# ------------------------------------------------------------------------------- downloading


def snapshot(model: Any, cache: Path) -> Path:
    """A model in the Hub's cache, as it is there after a download: shards are links to their
    hashes."""
    repository = cache / "models--ada--model"
    folder, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for directory in (folder, blobs, repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("As you like it.")
    (folder / "USE_POLICY.md").write_text("Be good.")
    for path in folder.glob("*.safetensors"):
        blob = blobs / sha256(path.read_bytes()).hexdigest()
        shutil.move(path, blob)
        os.symlink(blob, path)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_warm_cache_works_offline_and_all_of_a_model_goes_along(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `convert`, `heal` and `export`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = make_tiny_llama("gqa", tie_word_embeddings=tied)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[2, 5], bos_token_id=1
    )
    folder = snapshot(model, tmp_path / "cache")
    assert len(list(folder.glob("*.safetensors"))) > 1
    text = save_text(tmp_path / "text.txt")
    plain = [*CONVERT, "--cache-bits", 16, "--target", "llama"]
    commands: dict[str, list[Any]] = {
        "converted": ["convert", "ada/model", *plain],
        "healed": ["heal", tmp_path / "converted", "--text", text, *TRAINING],
        "exported": ["export", tmp_path / "healed", "--to", "llama"],
    }
    for name, arguments in commands.items():
        out = tmp_path / name
        result = tpa_convert(*arguments, "--out", out)
        assert result.exit_code == 0, result.output
        assert (out / "LICENSE.txt").read_text() == "As you like it."
        assert (out / "USE_POLICY.md").read_text() == "Be good."
        found = GenerationConfig.from_pretrained(out)
        assert (found.do_sample, found.temperature, found.top_p) == (True, 0.6, 0.9), name
        assert found.eos_token_id == [2, 5]
        tokenizer = AutoTokenizer.from_pretrained(out)
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        assert chat == "<a>"
        with safe_open(out / "model.safetensors", framework="pt") as file:
            assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118
    assert "base_model: ada/model" in (tmp_path / "converted" / "README.md").read_text()
