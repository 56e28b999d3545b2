"""Exports of converted models, loaded by a process that does not find the package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.conftest import make_tiny_tokenizer
from tests.conversions import source_of
from tpa_convert.export.save import save_converted

SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tpa_convert":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM

tokens = torch.load(sys.argv[1], weights_only=True)
results = []
for directory in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        results.append((type(model).__module__, model(tokens).logits))
torch.save(results, sys.argv[2])
"""


def without_package(
    models: Mapping[str, tuple[PreTrainedModel, PreTrainedModel]], tokens: Tensor, base: Path
) -> dict[str, tuple[Tensor, Any]]:
    """Logits of converted models in memory, and as such a process has them, with the name of the
    module that the model's class came from.

    Args:
        models: source and converted model, by names that make directories.
        tokens: [b, t].
        base: an empty directory.
    """
    for name, (source, model) in models.items():
        plan = {"kv_bytes": 1, "source_kv_bytes": 2}
        record = {"settings": {}, "plan": plan, "versions": {}}
        provenance = {"source": asdict(source_of(source).reference), "convert": record}
        (base / name).mkdir()
        save_converted(model, make_tiny_tokenizer(), base / name, "tiny", provenance)
    torch.save(tokens, base / "tokens.pt")
    places = [base / "tokens.pt", base / "results.pt", *(base / name for name in models)]
    subprocess.run(
        [sys.executable, "-c", SCRIPT, *places],
        cwd=base,
        env=os.environ | {"HF_MODULES_CACHE": str(base / "modules")},
        check=True,
        timeout=280,
    )
    found = torch.load(base / "results.pt", weights_only=True)
    with torch.no_grad():
        return {
            name: (model(tokens).logits, result)
            for (name, (_, model)), result in zip(models.items(), found, strict=True)
        }
