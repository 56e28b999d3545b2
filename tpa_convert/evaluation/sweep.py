"""Speed against batch and context: models beside each other and beside what the device allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from transformers import PreTrainedModel

from tpa_convert.evaluation.metrics.capacity import largest_batch
from tpa_convert.evaluation.metrics.speed import (
    Speed,
    SpeedSettings,
    fitting_prompt,
    measure_speed,
)
from tpa_convert.planning.rates import copy_bandwidth, device_name
from tpa_convert.progress import Track, no_tracking


@dataclass(frozen=True)
class SpeedPoint:
    """One model at one batch and context.

    Attributes:
        prefill, decode: tokens per second over the whole batch.
        latency: seconds a decoding step takes.
        cache_bytes: that a decoding step reads.
        floor: seconds it takes at least: weights and cache over the device's bandwidth.
    """

    model: str
    batch: int
    context: int
    prefill: float
    decode: float
    latency: float
    cache_bytes: float
    floor: float


@dataclass(frozen=True)
class LargestBatch:
    """How many sequences of so many tokens decode side by side in the device's memory."""

    model: str
    context: int
    batch: int


@dataclass(frozen=True)
class SpeedReport:
    """What a sweep measured.

    Attributes:
        device, dtype: that the models ran on and in.
        static: whether decoding used static caches (and CUDA graphs on a GPU).
        bandwidth: bytes read and written a second by a large copy.
        weight_bytes: that a decoding step reads, of each model; the first is the reference.
        points: model by model within each batch and context; what did not fit is not there.
        largest: model by model within each context; nothing if that was not asked for.
    """

    device: str
    dtype: str
    static: bool
    bandwidth: float
    weight_bytes: dict[str, float]
    points: tuple[SpeedPoint, ...]
    largest: tuple[LargestBatch, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SpeedReport:
        """Undoes `to_json`. Raises KeyError or TypeError for anything else."""
        points = tuple(SpeedPoint(**point) for point in values["points"])
        largest = tuple(LargestBatch(**each) for each in values.get("largest", ()))
        return cls(**{**values, "points": points, "largest": largest})

    def ratio(self, point: SpeedPoint, what: str) -> float | None:
        """`prefill` or `decode` of a point over that of the first model, if that fitted too."""
        first = next(iter(self.weight_bytes))
        for other in self.points:
            if (other.model, other.batch, other.context) == (first, point.batch, point.context):
                return getattr(point, what) / getattr(other, what)
        return None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table()
        cache = "static caches" if self.static else "dynamic caches"
        yield (
            f"{self.device}, {self.dtype}, {cache}; copies at {self.bandwidth / 1e9:,.0f} GB/s. "
            "× is against the first model; floor: time to read weights and cache at that rate, "
            "as a share of the time a step takes. What is missing did not fit."
        )
        if self.largest:
            yield self._largest_table()
            yield (
                "The largest batch is that of sequences which decode beside each other with "
                "dynamic caches, in the memory that all these models leave: to 2 %."
            )

    def _largest_table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("context", min_width=17, overflow="fold")
        table.add_column("largest batch", justify="right")
        table.add_column("×", justify="right")
        first = {each.context: each.batch for each in reversed(self.largest)}
        previous = None
        for each in self.largest:
            if each.context != previous:
                table.add_section()
                table.add_row(f"{each.context:,} tokens", style="bold")
            of_first = first[each.context]
            ratio = each.batch / of_first if of_first else None
            cells = f"{each.batch:,}", _times(ratio)
            table.add_row(Padding(each.model, (0, 0, 0, 2)), *cells)
            previous = each.context
        return table

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("batch × context", min_width=17, overflow="fold")
        for column in ("prefill/s", "×", "decode/s", "×", "ms/step", "floor", "cache MB"):
            table.add_column(column, justify="right", no_wrap=True)
        previous = None
        for point in self.points:
            place = (point.batch, point.context)
            if place != previous:
                table.add_section()
                table.add_row(f"{point.batch:,} × {point.context:,}", style="bold")
            table.add_row(
                Padding(point.model, (0, 0, 0, 2)),
                f"{point.prefill:,.0f}",
                _times(self.ratio(point, "prefill")),
                f"{point.decode:,.1f}",
                _times(self.ratio(point, "decode")),
                f"{point.latency * 1e3:.2f}",
                f"{point.floor / point.latency:.0%}",
                f"{point.cache_bytes / 1e6:,.1f}",
            )
            previous = place
        return table


def sweep_speed(
    models: Mapping[str, PreTrainedModel],
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    static: bool = False,
    fill: bool = False,
    track: Track = no_tracking,
) -> SpeedReport:
    """Speed of each model at each batch and context; what does not fit is left out.

    Args:
        static: whether to decode on static caches.
        fill: whether to fill the memory of the GPU, to find the largest batch of each context.
    """
    first = next(iter(models.values()))
    bandwidth = copy_bandwidth(first.device)
    weights = {name: weight_bytes(model) for name, model in models.items()}
    points = []
    for batch, context in track([(b, c) for b in batches for c in contexts], "Speed"):
        settings = SpeedSettings(batch, context, new_tokens, repeats, static)
        for name, speed in _those_that_fit(models, settings):
            floor = (weights[name] + speed.cache_bytes) / bandwidth
            points.append(
                SpeedPoint(
                    name,
                    batch,
                    fitting_prompt(models, settings),
                    speed.prefill,
                    speed.decode,
                    batch / speed.decode,
                    speed.cache_bytes,
                    floor,
                )
            )
    largest = []
    fitting = {fitting_prompt(models, SpeedSettings(1, n, new_tokens)): None for n in contexts}
    for context in track(list(fitting), "Largest batch") if fill else ():
        largest += [LargestBatch(n, context, largest_batch(m, context)) for n, m in models.items()]
    dtype = str(first.dtype).removeprefix("torch.")
    name = device_name(first.device)
    measured = tuple(points), tuple(largest)
    return SpeedReport(name, dtype, static, bandwidth, weights, *measured)


def _those_that_fit(
    models: Mapping[str, PreTrainedModel], settings: SpeedSettings
) -> Iterator[tuple[str, Speed]]:
    try:
        yield from measure_speed(models, settings).items()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        if len(models) > 1:
            for name, model in models.items():
                yield from _those_that_fit({name: model}, settings)


def weight_bytes(model: PreTrainedModel) -> float:
    """Bytes of weights that every decoding step reads: all but a table of embeddings of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    read = sum(p.nbytes for p in model.parameters())
    if head is not None and head.weight is not embedding.weight:
        read -= embedding.weight.nbytes
    return float(read)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
