"""One model from its files to a table, through the commands that a user types.

    python benchmarks/end_to_end.py gemma-3-270m.gguf --train healing-train.jsonl.xz \\
        --valid healing-valid.jsonl.xz --folder /tmp/gemma --ratios 0.25 0.125

Converts the source at each share of its cache, coded, calibrated on the training text once; then
evaluates all of them beside the source on held-out text. Prints each command with its wall time and
peak memory, and what it printed. Token blocks begin with the tokenizer's begin-of-text token where
it has one. Models stay in the folder, so that a run that was cut short goes on from there.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from common.machine import device_name, versions


def run(arguments: list[str]) -> None:
    """One command of the package; its output goes where this script's goes."""
    print(f"\n$ tpa-convert {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    environment = {**os.environ, "COLUMNS": "150"}
    subprocess.run([sys.executable, "-m", "tpa_convert", *arguments], check=True, env=environment)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"<!-- {time.perf_counter() - start:.0f} s; most memory of a command so far "
        f"{used.ru_maxrss / 2**20:.2f} GiB -->",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", help="a GGUF file, a directory or a Hub id")
    parser.add_argument("--train", required=True, help="text to calibrate on")
    parser.add_argument("--valid", required=True, help="text to evaluate on, with a source column")
    parser.add_argument("--folder", type=Path, required=True, help="for models and results")
    parser.add_argument("--ratios", nargs="+", default=["0.25", "0.125"])
    parser.add_argument("--calibration-blocks", default="16", help="of 512 tokens")
    parser.add_argument("--max-blocks", default="2", help="of 1024 tokens, of each held-out source")
    parser.add_argument("--quantised", nargs="*", default=[], help="bits of the source's own cache")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print(f"{device_name()}, {versions()}", flush=True)
    moments, made = given.folder / "moments.safetensors", []
    for ratio in given.ratios:
        out = given.folder / f"kept-{ratio}"
        made.append(str(out))
        if out.exists():
            continue
        if moments.exists():
            text = ["--moments", str(moments)]
        else:
            text = ["--calibration", given.train, "--save-moments", str(moments)]
            text += ["--calibration-blocks", given.calibration_blocks]
        run(["convert", given.source, "--kv-ratio", ratio, "--out", str(out), "--profile", *text])
    quantised = [part for bits in given.quantised for part in ("--quantised", bits)]
    text = ["--text", given.valid, "--max-blocks", given.max_blocks, "--batch-size", "1"]
    how = ["--no-speed", "--prompt", "", "--json", str(given.folder / "eval.json")]
    run(["eval", *made, "--against", given.source, *text, *quantised, *how])


if __name__ == "__main__":
    main()
