"""A server of `tpa-convert serve --continuous-batching`: does it say what `generate` says, is its
cache as large as promised, and does it outlive its clients?

    pip install '.[serve]'
    tpa-convert convert SOURCE --kv-ratio 0.125 --dtype float32 --out small
    python benchmarks/serve.py small

32 requests of different lengths are made at once through the openai client, on the loopback. Then
clients are killed while they are answered, and requests are sent that are wrong.
"""

from __future__ import annotations

import argparse
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tpa_convert  # noqa: F401  (makes the converted model known)
from common.machine import device_name, versions
from tpa_convert.export.inspection import inspect

REQUESTS, NEW, CACHE_TOKENS, BATCH_TOKENS = 32, 12, 8192, 256
STORY = (
    "once upon a time there was a lighthouse keeper who wrote a letter to the queen about the "
    "price of bread and the weather of that winter and he did not know that the ship which was to "
    "carry it had been lost "
)
COMMAND_LINE = """
from transformers.generation.continuous_batching import cache as paged
made = paged.PagedAttentionCache.__init__
def noted(self, *args, **kwargs):
    made(self, *args, **kwargs)
    for name, one in self.cache_allocators.items():
        tokens = one.num_blocks * one.bytes_per_block // one.bytes_per_token
        print(f"CACHE {one.bytes_per_token} {tokens} {self.cache_tensor.nbytes}", flush=True)
paged.PagedAttentionCache.__init__ = noted
from tpa_convert.cli import main
main()
"""
"""`tpa-convert`, which also prints how large its paged cache is."""
CLIENT = """
import openai, sys
client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
wanted = {"model": sys.argv[2], "prompt": sys.argv[3], "max_tokens": 400}
for part in client.completions.create(**wanted, stream=True):
    print("part", flush=True)
"""
"""A client that says when it is answered."""


def prompts() -> list[str]:
    """Of 2 to 33 words and more, no two alike."""
    return [" ".join([str(i), *(2 * STORY).split()[: i + 1 + i % 5]]) for i in range(REQUESTS)]


def generated(directory: Path, texts: list[str]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        output = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


class Server:
    """A server in a process of its own; `output` is what it printed until it listened."""

    def __init__(self, directory: Path):
        with closing(socket.create_server(("127.0.0.1", 0))) as taken:
            self.port = taken.getsockname()[1]
        arguments = ["serve", str(directory), "--host", "127.0.0.1", "--port", str(self.port)]
        arguments += ["--device", "cpu", "--dtype", "float32", "--continuous-batching"]
        arguments += ["--cache-tokens", str(CACHE_TOKENS), "--batch-tokens", str(BATCH_TOKENS)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND_LINE, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if "Uvicorn running" in line:
                break
        self.url, self.model = f"http://127.0.0.1:{self.port}/v1", str(directory)
        # With the client's own retries: a server may close a connection that was idle just then.
        self.client = openai.OpenAI(base_url=self.url, api_key="none", timeout=600)

    def ask(self, prompt: str) -> str:
        answer = self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=NEW, temperature=0
        )
        return answer.choices[0].text

    def at_once(self, texts: list[str]) -> list[str]:
        with ThreadPoolExecutor(len(texts)) as pool:
            return list(pool.map(self.ask, texts))

    def stop(self) -> int:
        """Its exit code, after it was asked to end."""
        self.process.terminate()
        self.output += self.process.communicate(timeout=60)[0]
        return self.process.returncode


def kill_clients(server: Server, count: int) -> None:
    """Clients that are killed as soon as they have got a part of their answer."""
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, server.url, server.model, f"{i} once upon"],
            stdout=subprocess.PIPE,
        )
        for i in range(count)
    ]
    for client in clients:
        assert client.stdout is not None
        client.stdout.readline()
        client.kill()
        client.wait()
        client.stdout.close()


def send_wrong_requests(server: Server) -> int:
    """How many of the requests were refused."""
    refused, client = 0, server.client.with_options(max_retries=0)
    for wrong in (
        lambda: client.completions.create(model="another", prompt="a", max_tokens=1),
        lambda: client.completions.create(
            model=server.model, prompt="a", extra_body={"max_tokens": "many"}
        ),
        lambda: client.chat.completions.create(
            model=server.model,
            messages=[{"content": "no role"}],  # type: ignore[list-item]
        ),
    ):
        try:
            wrong()
        except openai.APIStatusError:
            refused += 1
    with closing(socket.create_connection(("127.0.0.1", server.port))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    return refused


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("converted", type=Path, nargs="+")
    arguments = parser.parse_args()
    print(f"{device_name()}, {versions()}, openai {openai.__version__}")
    for directory in arguments.converted:
        texts, wanted = prompts(), generated(directory, prompts())
        server = Server(directory)

        def same(answers: list[str], wanted: list[str] = wanted) -> str:
            return f"{sum(a == b for a, b in zip(answers, wanted, strict=True))} of {len(wanted)}"

        found = inspect(directory)
        print(f"\n{directory.name}: {found.kv_bytes:,} bytes a token in {found.dtype} (inspect)")
        print(f"  equal to generate(), at once: {same(server.at_once(texts))}")
        print(f"  different answers among these: {len(set(wanted))}")
        kill_clients(server, 8)
        print(f"  equal after 8 clients were killed: {same(server.at_once(texts))}")
        print(f"  wrong requests refused: {send_wrong_requests(server)} of 3, and a half one sent")
        print(f"  equal after these: {same(server.at_once(texts))}")
        print(f"  still running: {server.process.poll() is None}; asked to end: {server.stop()}")
        for size, tokens, total in re.findall(r"CACHE (\d+) (\d+) (\d+)", server.output):
            print(
                f"  paged cache: {int(size):,} bytes a token, {int(tokens):,} tokens, "
                f"{int(total):,} bytes in all"
            )


if __name__ == "__main__":
    main()
