"""Files that commands write beside what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tpa_convert.cli.terminal import FIRST_PROCESS
from tpa_convert.export.output import atomic_file


def write_json(path: Path | None, result: Any) -> None:
    """Writes a result that has `to_json`, or plain values, where a file is named."""
    if path is None or not FIRST_PROCESS:
        return
    values = result if isinstance(result, dict) else result.to_json()
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
