"""What the moments of a coded cache are taken on: text alone, or text that the source samples too.

    python benchmarks/calibration_text.py SmolLM2-135M-Instruct.Q4_1.gguf --train shipped \\
        --valid valid.npz --valid-blocks 2 --calibration-blocks 16 \\
        --texts 0 8x512 8x128 4x512 8x64 --seeds 0 1

A text is how many of the calibration blocks (of 512 tokens) are sampled, `x`, and how many tokens a
sampled sequence has; shorter ones stand one after the other in a block. The last column is what
sampling took, in seconds of processor, whatever else the machine does. common/arguments.py says the
rest.
"""

from __future__ import annotations

import time

import torch

from common.arguments import parser
from common.blocks import train_blocks
from common.models import coded_model, load
from common.tables import Table
from tpa_convert.calibration.cache_moments import collect_cache_moments
from tpa_convert.healing.training.sampling import sample_blocks

LENGTH = 512


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--texts", nargs="+", default=["0", "8x512"])
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--share", default="12.5", help="percent of the bytes that are kept")
    arguments = options.parse_args()
    source = load(arguments.source)
    table = Table.start(source, arguments.valid, arguments.valid_blocks)
    count = arguments.calibration_blocks
    for seed in arguments.seeds:
        text = train_blocks(arguments.train, source, LENGTH, count, seed=seed)
        for name in arguments.texts:
            blocks, start = text, time.process_time()
            if name != "0":
                sampled, length = map(int, name.split("x"))
                tokens = sampled * LENGTH
                found = sample_blocks(source.model, source.tokenizer, tokens, length, seed=seed)
                blocks = torch.cat((text[sampled:], found.view(sampled, LENGTH)))
            seconds = time.process_time() - start
            moments = collect_cache_moments(source, blocks, seed=seed)
            model, floats = coded_model(source, moments, arguments.share)
            table.row(f"{name}, seed {seed}", model, floats, seconds)
            table.save("Moments on text that the source samples", arguments.json)


if __name__ == "__main__":
    main()
