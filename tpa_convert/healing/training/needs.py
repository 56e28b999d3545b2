"""What a healing run needs of the machine, counted on models without weights."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from tpa_convert.forward.divergence import CHUNK_BYTES
from tpa_convert.healing.training.adapters import adapter_parameters
from tpa_convert.healing.training.checkpoints import checkpoint_bytes
from tpa_convert.healing.training.checks import hidden_weight_for
from tpa_convert.healing.training.data import saved_bytes_per_token
from tpa_convert.healing.training.flops import flops_per_token
from tpa_convert.healing.training.preparation import choose_trained
from tpa_convert.healing.training.widths import even_widths
from tpa_convert.options.healing import HealingSettings

WEIGHT, GRADIENT, MOMENTS, HALF = 4, 4, 8, 2  # bytes a parameter: in fp32, and in bf16
# Compiled layers keep less than half of what uncompiled ones do: 0.44 and 0.46 of it in two models
# (benchmarks/notes/2026-11-25-healing-throughput.md).
COMPILED = 0.5


@dataclass(frozen=True)
class HealingNeeds:
    """Of one run, on a GPU that computes in bfloat16.

    Attributes:
        gpu: bytes on each GPU, with one sequence a forward pass.
        sequence: bytes that each more takes there.
        memory: bytes of main memory, of the process that loads the models.
        disk: bytes for checkpoints, at most.
        flops: floating-point operations of the whole run.
    """

    gpu: int
    sequence: int
    memory: int
    disk: int
    flops: float


def healing_needs(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    settings: HealingSettings,
    *,
    shards: int = 1,
) -> HealingNeeds:
    """What healing needs.

    Args:
        student, teacher: may be without weights; only their shapes count.
        shards: GPUs that share one copy of everything (FSDP).

    Raises:
        UserError: settings that do not go with these models.
    """
    weight = hidden_weight_for(student, teacher, settings.hidden_weight)
    parameters, trained = _parameters(student, settings)
    teacher_bytes = HALF * teacher.num_parameters()
    on_gpu = teacher_bytes
    if settings.offload_teacher:
        layers = [HALF * _count(layer) for layer in teacher.get_decoder().layers]
        on_gpu += max(layers) - sum(layers)
    held = WEIGHT * parameters + (GRADIENT + MOMENTS) * trained + on_gpu
    # Beside them: weights in bf16, of what is trained all at once, else of a layer; and a head.
    whole_layer = HALF * max(_count(layer) for layer in student.get_decoder().layers)
    head = 2 * HALF * student.get_output_embeddings().weight.numel()
    beside = max(HALF * trained, whole_layer) if shards == 1 else 3 * whole_layer
    config = student.config.get_text_config()
    per_token = COMPILED * saved_bytes_per_token(config, settings.gradient_checkpointing)
    if weight:
        per_token += HALF * config.hidden_size * config.num_hidden_layers
    sequence = int(per_token * settings.block_length)
    return HealingNeeds(
        gpu=held // shards + beside + head + CHUNK_BYTES + sequence,
        sequence=sequence,
        memory=WEIGHT * parameters + teacher_bytes,
        disk=disk_needed(student, settings, shards=shards),
        flops=flops_per_token(student, teacher, settings.block_length) * settings.tokens,
    )


def disk_needed(student: PreTrainedModel, settings: HealingSettings, *, shards: int = 1) -> int:
    """Bytes for checkpoints, at most. Frozen weights are in none but those of sharded models."""
    parameters, trained = _parameters(student, settings)
    return checkpoint_bytes(trained if shards == 1 else parameters, trained)


def _parameters(student: PreTrainedModel, settings: HealingSettings) -> tuple[int, int]:
    """All parameters and those that are trained, adapters among them."""
    with even_widths(student):
        choose_trained(student, settings)
        parameters = student.num_parameters()
        trained = student.num_parameters(only_trainable=True)
    if settings.trainable == "lora":
        adapters = adapter_parameters(student, settings.lora_rank)
        parameters, trained = parameters + adapters, trained + adapters
    return parameters, trained


def _count(module: object) -> int:
    return sum(p.numel() for p in module.parameters())  # type: ignore[attr-defined]
