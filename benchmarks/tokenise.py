"""Training text as packed token blocks in a file, so that several benchmarks tokenise it once.

    python benchmarks/tokenise.py SmolLM2-135M-Instruct.Q4_1.gguf healing-train.jsonl.xz tokens.npy
    python benchmarks/tokenise.py … without.npy --without '[Pp]ython'
    python benchmarks/tokenise.py … only.npy --only '[Pp]ython'

An .npz holds the blocks of every value of a `source` column by name, at most --blocks each, as the
benchmarks take held-out text; an .npy holds them all.

`--without` leaves out every document in which the pattern occurs, and so all of a source that it
marks, for held-out text unlike all training text; `--only` leaves out all others.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

from torch import Tensor

from common.blocks import save_blocks
from tpa_convert.evaluation.texts import blocks_by_source
from tpa_convert.sources import load_source
from tpa_convert.text.packing import packed_blocks
from tpa_convert.text.read import load_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("text")
    parser.add_argument("out")
    parser.add_argument("--blocks", type=int, help="default: all")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--without", metavar="REGEX")
    parser.add_argument("--only", metavar="REGEX")
    arguments = parser.parse_args()
    documents = load_documents(arguments.text)
    total = len(documents)
    for given, wanted in ((arguments.only, True), (arguments.without, False)):
        if given:
            pattern = re.compile(given)
            documents = documents.filter(
                lambda row, pattern=pattern, wanted=wanted: (
                    bool(pattern.search(row["text"])) is wanted
                )
            )
    tokenizer = load_source(arguments.source).tokenizer
    if arguments.out.endswith(".npz"):
        count = arguments.blocks or len(documents)
        blocks: Mapping[str, Tensor] = blocks_by_source(
            tokenizer, documents, arguments.length, count
        )
    else:
        packed = packed_blocks(documents, tokenizer, arguments.length, arguments.blocks, seed=0)
        blocks = {"text": packed}
    save_blocks(arguments.out, blocks)
    tokens = sum(part.numel() for part in blocks.values())
    print(f"{len(documents)} of {total} documents, {tokens:,} tokens in {arguments.out}")


if __name__ == "__main__":
    main()
