"""`serve`: a client of the OpenAI API gets what `generate` gives, and no client can stop it."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command_line import CONVERT, error_of, save_source, tpa_convert
from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.test_chat import TEMPLATE
from tests.test_generation import SPEAKING
from tpa_convert.options.usage import ServeOptions
from tpa_convert.pipeline import serving
from tpa_convert.pipeline.serving import paged_sizes

REQUESTS = 32
NEW = 12


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    source, out = folder / "source", folder / "converted"
    model = make_tiny_llama("gqa", vocab_size=99, **SPEAKING)  # as many as the tokenizer knows
    model.generation_config.eos_token_id = None
    model.save_pretrained(source)
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    result = tpa_convert("convert", source, *CONVERT, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        return taken.getsockname()[1]


class Server:
    """A server in a process of its own, ready to answer."""

    def __init__(self, directory: Path, *arguments: str):
        port = free_port()
        command = [sys.executable, "-m", "tpa_convert", "serve", str(directory)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.output = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:  # until it listens, or ends
            self.output += line
            if "Uvicorn running" in line:
                break
        assert self.process.poll() is None, self.output
        self.url, self.model = f"http://127.0.0.1:{port}/v1", str(directory)
        self.port = port

    def client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=self.url, api_key="none", **options)

    def stop(self) -> None:
        """As a service manager does; it has to end by itself."""
        self.process.terminate()
        try:
            rest, _ = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        self.output += rest


@pytest.fixture(scope="module", params=["one after the other", "together"])
def server(request: pytest.FixtureRequest, converted: Path) -> Iterator[Server]:
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    together = request.param == "together"
    if together and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("refused before transformers 5.20")
    sizes = ("--cache-tokens", "4096", "--batch-tokens", "128")
    started = Server(converted, *(("--continuous-batching", *sizes) if together else ()))
    yield started
    started.stop()
    assert "Error in generation loop" not in started.output


def questions() -> list[str]:
    return [f"{i} " + "what is this? " * (i % 7) for i in range(REQUESTS)]


@cache
def loaded(directory: Path) -> tuple[Any, Any]:
    """Tokenizer and model."""
    kinds = AutoTokenizer, AutoModelForCausalLM
    tokenizer, model = (kind.from_pretrained(directory) for kind in kinds)
    return tokenizer, model


@cache
def expected(directory: Path, text: str) -> str:
    tokenizer, model = loaded(directory)
    tokens = torch.tensor([tokenizer(text)["input_ids"]])
    output = model.generate(tokens, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


def test_concurrent_chats_are_as_generated(server: Server, converted: Path) -> None:
    client = server.client()

    def ask(question: str) -> str:
        answer = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": question}],
            max_tokens=NEW,
            temperature=0,
        )
        return answer.choices[0].message.content

    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(ask, questions()))
    wanted = [expected(converted, f"[user]{q}\n[assistant]") for q in questions()]
    assert len(set(wanted)) > REQUESTS // 2, "these answers hardly depend on the questions"
    assert answers == wanted


def test_streamed_completions_are_as_generated(server: Server, converted: Path) -> None:
    stream = server.client().completions.create(
        model=server.model, prompt="once upon", max_tokens=NEW, temperature=0, stream=True
    )
    parts = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(parts) > 2
    assert "".join(parts) == expected(converted, "once upon")


def test_wrong_requests_and_clients_that_leave_do_not_stop_it(
    server: Server, converted: Path
) -> None:
    import openai

    client = server.client()
    once = server.client(max_retries=0)
    with pytest.raises(openai.APIStatusError):
        once.completions.create(model="another", prompt="a", max_tokens=1)
    with pytest.raises(openai.APIStatusError):
        once.chat.completions.create(model=server.model, messages=[{"content": "no role"}])
    with closing(socket.create_connection(("127.0.0.1", server.port))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    stream = client.completions.create(
        model=server.model, prompt="once", max_tokens=200, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()
    answer = client.completions.create(
        model=server.model, prompt="and then", max_tokens=NEW, temperature=0
    )
    assert answer.choices[0].text == expected(converted, "and then")
    assert [model.id for model in client.models.list()] == [server.model]


def test_an_attention_that_is_none_is_told(converted: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    message = error_of(
        tpa_convert("serve", converted, "--attention", "fast", "--port", free_port())
    )
    assert re.search("--attention must be one of .*eager, .*sdpa.*, not fast", message)


def test_a_port_that_is_taken_is_told(converted: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        result = tpa_convert("serve", converted, "--host", "127.0.0.1", "--port", port)
    assert re.search(
        rf"cannot listen on 127.0.0.1:{port} .*choose another --port", error_of(result)
    )


def test_other_models_are_refused(converted: Path, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    assert "not a converted model" in error_of(tpa_convert("serve", source))
    assert "--cache-tokens goes with --continuous-batching" in error_of(
        tpa_convert("serve", converted, "--cache-tokens", "8")
    )


def test_the_paged_cache_holds_what_is_asked_for(converted: Path) -> None:
    """Blocks are counted in the source's bytes, of which the converted model needs a quarter."""
    options = ServeOptions(continuous_batching=True, cache_tokens=4096, batch_tokens=64)
    assert paged_sizes(converted, options, "cuda") == {
        "cb_num_blocks": 4,  # of 256 tokens of the source
        "cb_max_batch_tokens": 64,
    }
    # Codes stay as they are in fp16, where a block of the source takes half of the bytes.
    half = options.model_copy(update={"dtype": "float16"})
    assert paged_sizes(converted, half, "cuda")["cb_num_blocks"] == 8
    default = ServeOptions(continuous_batching=True)
    assert paged_sizes(converted, default, "cuda") == {}
    assert paged_sizes(converted, default, "cpu")["cb_num_blocks"] == 32


def test_what_cannot_be_served_is_told_before_it_is_asked_for(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "serve", stopped)
    bare = tmp_path / "bare"
    shutil.copytree(converted, bare)
    (bare / "chat_template.jinja").unlink()
    for folder, told in ((bare, True), (converted, False)):
        result = tpa_convert("serve", folder)
        assert ("no chat template" in result.output) == told
        assert "interrupted: the server has stopped" in result.output
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert "holds no tokenizer" in tpa_convert("serve", bare).output
    assert "error: " in tpa_convert("serve", tmp_path / "nowhere").output
