"""Calibration and training blocks, held-out blocks and moments for `coded_spike.py`.

    python benchmarks/coded_data.py SmolLM2-135M-Instruct.Q4_1.gguf healing-train.jsonl.xz \\
        healing-valid.jsonl.xz DATA
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tpa_convert.architectures import load_source
from tpa_convert.calibration.packing import packed_blocks
from tpa_convert.calibration.text import load_documents, token_blocks
from tpa_convert.evaluation.perplexity import blocks_by_source

from tpa_convert.calibration.moments import collect_moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("train")
    parser.add_argument("valid")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    source = load_source(arguments.source)
    arguments.out.mkdir(parents=True, exist_ok=True)
    valid = blocks_by_source(source.tokenizer, load_documents(arguments.valid), 1024, 64)
    tokens = {name: ids.numpy().astype(np.uint16) for name, ids in valid.items()}
    np.savez(arguments.out / "valid.npz", **tokens)
    documents = load_documents(arguments.train)
    calibration = token_blocks(documents, source.tokenizer, 512, 192, seed=0)
    np.save(arguments.out / "calibration.npy", calibration.numpy().astype(np.uint16))
    moments = collect_moments(source, calibration[:64].long())
    moments.save(arguments.out / "moments.safetensors")
    training = packed_blocks(documents, source.tokenizer, 1024, 8400, seed=1)
    np.save(arguments.out / "train.npy", training.numpy().astype(np.uint16))


if __name__ == "__main__":
    main()
