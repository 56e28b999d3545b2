"""Text that the source samples, as token blocks in a file, for training on what it was trained on.

    python benchmarks/sample_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf text.npy --tokens 5e6
    python benchmarks/sample_smollm2.py … chat.npy --tokens 2e6 --chat

Prints the speed. The files go to `--train` of the other benchmarks, beside real text or alone.
"""

from __future__ import annotations

import argparse
import time

import torch

from common.blocks import save_blocks
from common.machine import device_name, versions
from tpa_convert.healing.training.sampling import sample_blocks
from tpa_convert.sources import load_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--tokens", type=float, default=1e6)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = load_source(arguments.source, dtype=torch.bfloat16, device=device)
    start = time.perf_counter()
    blocks = sample_blocks(
        source.model,
        source.tokenizer,
        int(arguments.tokens),
        arguments.length,
        chat=arguments.chat,
        seed=arguments.seed,
    )
    seconds = time.perf_counter() - start
    save_blocks(arguments.out, {"text": blocks})
    print(
        f"{device_name()}, {versions()}: {blocks.numel():,} tokens in {arguments.out}, "
        f"{seconds:.1f} s, {blocks.numel() / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
