"""Time models beside their source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tpa_convert.errors import UserError
from tpa_convert.evaluation.sweep import SpeedReport, sweep_speed
from tpa_convert.options.bench import BenchOptions
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline.evaluation import load_side_by_side
from tpa_convert.pipeline.selection import usable_device
from tpa_convert.pipeline.subjects import subjects
from tpa_convert.progress import Track, no_tracking


def bench(
    models: str | Path | Sequence[str | Path],
    options: BenchOptions | None = None,
    *,
    against: str | SourceOptions | None = None,
    device: str = "auto",
    track: Track = no_tracking,
) -> SpeedReport:
    """Prefill and decoding speed of models against batch and context, the source first.

    Args:
        models: as `evaluate` takes them.
        against: the source; by default the one that converted models record.

    Raises:
        UserError: see `evaluate`; or memory is to be filled, and the models are not on a GPU.
    """
    options = options or BenchOptions()
    if options.fill and not usable_device(device).startswith("cuda"):
        raise UserError("--fill needs a GPU: it fills the memory of one")
    columns, _ = load_side_by_side(subjects(models), against, device, track)
    return sweep_speed(
        columns,
        options.batches,
        options.contexts,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        static=options.static,
        fill=options.fill,
        track=track,
    )
