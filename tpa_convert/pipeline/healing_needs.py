"""What `heal` would need, before any weight is read: as asked, and with what needs less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tpa_convert.export.save import converted_config, read_provenance
from tpa_convert.families import family_of
from tpa_convert.healing.training.hardware import peak_flops
from tpa_convert.healing.training.needs import HealingNeeds, healing_needs
from tpa_convert.options.healing import HealOptions
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline.selection import source_options
from tpa_convert.sources import read_source_config

SHARDS = 8  # GPUs of a usual host
UTILISATION = 0.4  # of a GPU's peak; healing reached 0.29 with 135 M parameters and 0.49 with 1.1 B
LESS = (
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "trainable": "lora"},
    {"gradient_checkpointing": True, "trainable": "lora", "offload_teacher": True},
)
"""From cheap to dear."""


@dataclass(frozen=True)
class HealingPreview:
    """What healing a model takes.

    Attributes:
        options: of the run, as asked.
        parameters, source_parameters: of both models.
        device, capacity: name and bytes of the GPU at hand, None without one.
        seconds: on that GPU, None if its peak is not known.
        ways: what each way needs: as asked first, then with further flags of `heal`.
    """

    options: HealOptions
    parameters: int
    source_parameters: int
    device: str | None
    capacity: int | None
    seconds: float | None
    ways: dict[str, HealingNeeds]

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "source_parameters": self.source_parameters,
            "device": self.device,
            "capacity": self.capacity,
            "seconds": self.seconds,
            "ways": {name: asdict(needs) for name, needs in self.ways.items()},
        }


def preview_healing(
    directory: str | Path, options: HealOptions, *, source: str | SourceOptions | None = None
) -> HealingPreview:
    """What healing the converted model in `directory` needs, as `options` ask and with less.

    Args:
        source: what to learn from; by default the recorded source.

    Raises:
        UserError: there is no such model, or its source cannot be found.
    """
    record = read_provenance(directory)["source"]
    where = source_options(source or SourceOptions(model=record["id"], revision=record["revision"]))
    config = read_source_config(
        where.model, revision=where.revision, trust_remote_code=where.trust_remote_code
    )
    family = family_of(config)
    student = _without_weights(converted_config(directory))
    teacher = _without_weights(
        config,
        trust_remote_code=where.trust_remote_code,
        attn_implementation=family.attention_implementation,
    )
    ways = dict(_ways(student, teacher, options))
    asked = next(iter(ways.values()))
    name = capacity = seconds = None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        name, capacity = device.name, device.total_memory
        peak = peak_flops(name)
        seconds = None if peak is None else asked.flops / (UTILISATION * peak)
    return HealingPreview(
        options,
        student.num_parameters(),
        teacher.num_parameters(),
        name,
        capacity,
        seconds,
        ways,
    )


def _ways(
    student: PreTrainedModel, teacher: PreTrainedModel, options: HealOptions
) -> Iterator[tuple[str, HealingNeeds]]:
    """Names and needs of what could be run."""
    yield "as asked", healing_needs(student, teacher, options)
    seen = [options]
    for changes in LESS:
        kept = {} if options.trainable == "all" else {"trainable": options.trainable}
        changed = options.model_copy(update=changes | kept)
        if changed not in seen:
            seen.append(changed)
            flags = (_flag(n, v) for n, v in (changes | kept).items() if getattr(options, n) != v)
            yield " ".join(flags), healing_needs(student, teacher, changed)
    # What is sharded is not offloaded.
    sharded = options.model_copy(update={"offload_teacher": False})
    yield f"FSDP on {SHARDS} GPUs", healing_needs(student, teacher, sharded, shards=SHARDS)


def _flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if value is True else f"{flag} {value}"


def _without_weights(config: Any, **settings: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **settings)
