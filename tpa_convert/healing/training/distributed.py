"""Several processes, one GPU each, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    disable_fsdp_ram_efficient_loading,
    fsdp2_prepare_model,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tpa_convert.errors import UserError

# The first process may sample text while the others wait; a launcher ends them if it dies.
TIMEOUT = timedelta(hours=2)


def processes() -> PartialState:
    """This process among those of the run, which are joined on the first call."""
    # Weights come from memory, on every process, and not from the first one's.
    disable_fsdp_ram_efficient_loading()
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)


def sharding() -> bool:
    """Whether the launcher asked for FSDP.

    Raises:
        UserError: for its first version.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError("healing needs version 2 of FSDP: pass --fsdp_version 2 to accelerate")
    return True


def _of_all(value: Any) -> list[Any]:
    """What each process has."""
    processes()  # else accelerate takes this process for the only one, also later
    return gather_object([value])


def smallest(number: int) -> int:
    """The smallest of all processes' numbers."""
    return min(_of_all(number))


def refuse_difference(value: Any, what: str) -> None:
    """Refuse to go on where processes do not agree.

    Raises:
        UserError: on all of them.
    """
    if any(other != value for other in _of_all(value)):
        raise UserError(f"the processes of this run have different {what}")


def set_wrapping(accelerator: Accelerator, model: PreTrainedModel, bf16: bool) -> None:
    """Make FSDP shard `model` layer by layer when it is prepared next."""
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    layers = model.get_decoder().layers
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
    # Not accelerate's policy, which reduces gradients and returns losses in bfloat16.
    plugin.mixed_precision_policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if bf16
        else MixedPrecisionPolicy()
    )


def shard_frozen(accelerator: Accelerator, model: PreTrainedModel, bf16: bool) -> PreTrainedModel:
    """Shard a model that is not trained; `Accelerator.prepare` wants an optimiser."""
    set_wrapping(accelerator, model, bf16)
    return fsdp2_prepare_model(accelerator, model)


def gathered(weight: Tensor) -> Tensor:
    """A weight as a whole, where FSDP has left only this process's part."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
