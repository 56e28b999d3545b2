"""One process of a healing run that a launcher started."""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests.conftest import make_tiny_llama
from tests.conversions import convert_coded, convert_tiny
from tests.tiny_models import MODELS
from tpa_convert import pipeline
from tpa_convert.cli.commands import app
from tpa_convert.forward.passes import CAUSAL_SDPA
from tpa_convert.healing import HealingInterrupted, HealingReport, HealingSettings, heal
from tpa_convert.healing.training import distributed, preparation
from tpa_convert.healing.training.distributed import from_first, outline, sharding
from tpa_convert.healing.training.trainer import DistillationTrainer

STEPS = 6


def blocks(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (count, 16), generator=generator)


VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "tied": {"tied": True, "hidden_weight": 0.5},
    "lora": {"trainable": "lora"},
    "capped": {"family": "gemma3"},
    "coded": {"coded": True},
}


def models(tied: bool, family: str | None, coded: bool) -> tuple[Any, Any]:
    """A teacher and its converted student; of another family than Llama, two different models."""
    if coded:
        teacher = make_tiny_llama("mqa")  # one process has no row of what has one for each head
        return teacher, convert_coded(teacher)
    if family is not None:
        return MODELS[family](seed=1), MODELS[family](seed=2)
    teacher = make_tiny_llama(tie_word_embeddings=tied)
    return teacher, convert_tiny(teacher, width_k=12, width_v=8)


def run(
    directory: Path,
    *,
    tied: bool = False,
    family: str | None = None,
    coded: bool = False,
    **changes: Any,
) -> tuple[HealingReport, Any]:
    """Heals a tiny model on whatever processes there are. Under FSDP all but the first have its
    outline only."""
    teacher, student = models(tied, family, coded)
    if sharding():
        teacher, student = from_first(
            lambda: (teacher, student), lambda pair: (outline(pair[0]), outline(pair[1]))
        )
        matrices = [p for model in (teacher, student) for p in model.parameters() if p.ndim > 1]
        assert all(p.is_meta != PartialState().is_main_process for p in matrices)
    settings = HealingSettings(
        tokens=STEPS * 128,
        tokens_per_step=128,
        batch_size=2,  # of 8 blocks a step, so that gradients are accumulated
        attention_learning_rate=1e-2,
        learning_rate=3e-3,
        warmup_steps=2,
        valid_steps=3,
        bf16=False,
        torch_compile=False,
        **changes,
    )
    with noted_memory(directory, student, teacher) if sharding() else nullcontext():
        report = heal(
            student,
            teacher,
            None,
            blocks(20, seed=5),
            settings=settings,
            output_dir=directory,
            valid_blocks=blocks(6, seed=6),
            progress=False,
        )
    return report, student


@contextmanager
def noted_memory(directory: Path, *models: nn.Module) -> Iterator[None]:
    """Each process notes what it holds of both models, as a share of their bytes: when one of them
    is about to be sharded, and before the first step. The models that are shared have to be those
    whose passes were made fast."""
    of_models = {p.untyped_storage().data_ptr() for p in parameters(*models) if not p.is_meta}
    # Kept, so that nothing comes to lie in their places, whenever others let go of them.
    elsewhere = {place: x for place, x in tensors().items() if place not in of_models}
    prepare, prepared = distributed.fsdp2_prepare_model, DistillationTrainer.create_scheduler
    held: list[int] = []

    def noting_prepare(*arguments: Any) -> nn.Module:
        held.append(tensor_bytes(elsewhere))
        return prepare(*arguments)

    def noting_prepared(trainer: DistillationTrainer, *arguments: Any, **options: Any) -> Any:
        held.append(tensor_bytes(elsewhere))
        shared = trainer.model, trainer.teacher
        assert all(model.config._attn_implementation == CAUSAL_SDPA for model in shared)
        whole = sum(p.nbytes for p in parameters(*shared))
        path = directory / f"memory-{PartialState().process_index}.json"
        path.write_text(json.dumps([count / whole for count in held]))
        return prepared(trainer, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "fsdp2_prepare_model", noting_prepare)
        patch.setattr(DistillationTrainer, "create_scheduler", noting_prepared)
        yield


def parameters(*models: nn.Module) -> list[nn.Parameter]:
    return [p for model in models for p in model.parameters()]


def tensors() -> dict[int, Tensor]:
    """One tensor of this process for each place in memory that tensors take."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and not x.is_meta]
    return {x.untyped_storage().data_ptr(): x for x in found}


def tensor_bytes(elsewhere: Mapping[int, Tensor]) -> int:
    """What all tensors of this process take that do not lie elsewhere."""
    held = (x for place, x in tensors().items() if place not in elsewhere)
    return sum(x.untyped_storage().nbytes() for x in held)


def use_fsdp() -> None:
    """What `accelerate launch --use_fsdp --fsdp_version 2` does, on a CPU too."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if torch.cuda.is_available():
        return
    # accelerate shards on accelerators only: let it take this CPU for one.
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


class Interrupt(TrainerCallback):
    """Sends the first process a signal in the third step."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 2 and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted_run(directory: Path, **variant: Any) -> None:
    trainer = preparation.DistillationTrainer
    preparation.DistillationTrainer = lambda **kwargs: trainer(  # type: ignore[assignment, misc]
        **{**kwargs, "callbacks": [*kwargs["callbacks"], Interrupt()]}
    )
    with pytest.raises(HealingInterrupted, match="step 3 of 6"):
        run(directory, **variant)
    preparation.DistillationTrainer = trainer  # type: ignore[misc]


def run_command(directory: Path, command: list[str]) -> None:
    """Runs a `heal` command. Each process notes how many bytes of parameters it has loaded."""
    heal_model = pipeline.healing.heal_model

    def counting(student: Any, teacher: Any, *arguments: Any, **options: Any) -> Any:
        parameters = [p for model in (student, teacher) for p in model.parameters()]
        found = {
            "bytes": sum(p.nbytes for p in parameters if not p.is_meta),
            "all": sum(p.nbytes for p in parameters),
        }
        path = directory / f"process-{PartialState().process_index}.json"
        path.write_text(json.dumps(found))
        return heal_model(student, teacher, *arguments, **options)

    pipeline.healing.heal_model = counting  # type: ignore[assignment]
    app(command, standalone_mode=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--interrupt", action="store_true", help="and resume")
    parser.add_argument(
        "--command", nargs=argparse.REMAINDER, help="of tpa-convert, to run after that"
    )
    options = parser.parse_args()
    gc.freeze()  # what is imported is neither garbage nor of interest
    if options.fsdp:
        use_fsdp()
    for name, variant in VARIANTS.items():
        directory = options.directory / name
        if options.interrupt:
            interrupted_run(directory, **variant)
        report, student = run(directory, **variant)
        if PartialState().is_main_process:
            torch.save(student.state_dict(), directory / "student.pt")
            (directory / "report.json").write_text(json.dumps(asdict(report)))
    if options.command:
        run_command(options.directory, options.command)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
