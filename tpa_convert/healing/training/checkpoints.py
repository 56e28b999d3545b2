"""Which run a checkpoint belongs to, and whether it can be continued."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.errors import UserError
from tpa_convert.healing.training.distributed import from_first
from tpa_convert.options.healing import HealingSettings

# A run may be continued with other values of these: they change its speed, not its loss curve.
FREE_SETTINGS = {
    "batch_size",
    "bf16",
    "torch_compile",
    "save_steps",
    "valid_steps",
    "stop_at",
    "gradient_checkpointing",
    "log_to",
    "offload_teacher",
}


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest complete `checkpoint-N`. Later ones, which a killed run left half-written, go."""
    found = [path for path in directory.glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return path
        except (OSError, ValueError):
            shutil.rmtree(path)  # its state file, written last, is missing or cut short
    return None


def checkpoint_bytes(saved: int, trained: int) -> int:
    """Disk that a run needs at most for so many parameters: fp32 weights and Adam's moments, twice,
    since the old checkpoint goes when the new one is complete."""
    return 2 * (4 * saved + 8 * trained)


def check_disk(needed: int, output_dir: Path, checkpoint: Path | None) -> None:
    """Refuse to start what could not save its checkpoints, of `needed` bytes in all, beside the one
    that is there."""
    if checkpoint is not None:
        needed -= sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    output_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"checkpoints need {needed / 1e9:.1f} GB, but {output_dir} has {free / 1e9:.1f} GB "
            "free: make room or choose another directory"
        )


def fingerprint(
    settings: HealingSettings,
    teacher: PreTrainedModel,
    blocks: Tensor,
    valid_blocks: Tensor | None,
    sharded: bool,
) -> dict[str, Any]:
    """What a checkpoint can be continued with, JSON-able: settings, hashes of source and text."""

    def source() -> str:
        return _digest(_sample(weight) for weight in teacher.parameters())

    # Options of a recipe hold more than settings.
    kept = set(HealingSettings.model_fields) - FREE_SETTINGS
    return {
        **settings.model_dump(mode="json", include=kept),
        "source": from_first(source) if sharded else source(),
        "text": _digest([blocks]),
        "held-out text": None if valid_blocks is None else _digest([valid_blocks]),
        "FSDP": sharded,
    }


def _sample(weight: Tensor) -> Tensor:
    """A few numbers of a weight, as bits that do not depend on whether it was widened."""
    return weight.detach().flatten()[:64].to(torch.bfloat16).view(torch.int16)


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def check_run(path: Path, run: dict[str, Any], checkpoint: Path | None) -> None:
    """Refuse to continue another run's checkpoint; note down what this run is."""
    if checkpoint is not None and path.exists():
        previous = json.loads(path.read_text())
        differing = sorted(key for key in run if previous.get(key) != run[key])
        if differing:
            raise UserError(
                f"{checkpoint} belongs to a run with different {', '.join(differing)}: "
                "repeat that run's settings, or start anew with --no-resume"
            )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(run, indent=2) + "\n")
    os.replace(temporary, path)
