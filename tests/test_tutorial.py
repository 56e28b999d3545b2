"""The tutorial, followed word for word, on the first layers of the model that it names."""

from __future__ import annotations

import json
import lzma
import re
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.command_line import tpa_convert
from tests.test_serve import Server

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8").split("## Your own model")[0]
MODEL = Path("recipes/embedded_model/model")
LAYERS = 1
CHARACTERS = 150_000
SMALLER = {"131072": "8192", "24": "4"}
"""Numbers of the page, tokens and blocks, that would only take time here."""


def commands(page: str, program: str) -> list[list[str]]:
    """The lines of the page that call a program, as its arguments."""
    return [shlex.split(line)[1:] for line in re.findall(rf"^ {{4}}({program} .*)$", page, re.M)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a smaller model and the beginnings of the texts."""
    folder = tmp_path_factory.mktemp("checkout")
    out = folder / MODEL
    shutil.copytree(ROOT / MODEL, out)
    model = AutoModelForCausalLM.from_pretrained(ROOT / MODEL)
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    model.config.layer_types = None
    model.save_pretrained(out)
    for name in ("valid.txt.xz", "train-sample.txt.xz"):
        text = lzma.decompress((ROOT / MODEL.parent / name).read_bytes()).decode()
        beginning = text[:CHARACTERS].encode()
        (folder / MODEL.parent / name).write_bytes(lzma.compress(beginning))
    return folder


@pytest.fixture(scope="module")
def followed(folder: Path) -> Path:
    """The checkout after every command but those that go on until they are stopped."""
    written = {"plan": "plan.png", "convert": "small", "heal": "healed", "report": "healed.html"}
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, *arguments in commands(PAGE, "tpa-convert"):
            called.append(name)
            if name == "serve":
                continue
            result = tpa_convert(name, *(SMALLER.get(a, a) for a in arguments))
            assert result.exit_code == 0, f"{name}: {result.output}"
            assert name not in written or Path(written[name]).exists()
    order = ["plan", "convert", "inspect", "eval", "heal", "eval", "report", "generate", "serve"]
    assert called == order
    return folder


def test_every_command_and_the_python_do_what_the_page_says(
    followed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(followed)
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.startswith("She was very glad to ")


def test_the_server_answers_the_request_of_the_page(followed: Path, monkeypatch) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    monkeypatch.chdir(followed)
    [(_, directory, *options)] = [c for c in commands(PAGE, "tpa-convert") if c[0] == "serve"]
    del options[options.index("--port") :]  # the test takes one that is free
    server = Server(Path(directory), *options)
    try:
        [request] = commands(PAGE, "curl")
        asked = json.loads(request[request.index("-d") + 1])
        assert request[0].endswith("/v1/completions")
        assert server.client().completions.create(**asked).choices[0].text
    finally:
        server.stop()


def test_a_command_that_is_wrong_would_be_seen(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    [(name, *arguments)] = commands("    tpa-convert inspect small --colour\n", "tpa-convert")
    assert tpa_convert(name, *arguments).exit_code == 2
