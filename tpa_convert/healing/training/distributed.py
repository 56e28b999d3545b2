"""Several processes, one GPU each, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    broadcast_object_list,
    disable_fsdp_ram_efficient_loading,
    fsdp2_prepare_model,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import init_hf_modules

from tpa_convert.errors import UserError

# The first process may sample text while the others wait; a launcher ends them if it dies.
TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


def processes() -> PartialState:
    """This process among those of the run, which are joined on the first call."""
    # `fill` instead: accelerate's way fails for models with buffers in their state, as coded ones.
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


def from_first(make: Callable[[], T], sent: Callable[[T], T] = lambda made: made) -> T:
    """What the first process makes, on all of them.

    Args:
        make: called in the first process only.
        sent: what the others get of it; has to be picklable.
    """
    if processes().is_main_process:
        made = make()
        broadcast_object_list([sent(made)])
        return made
    # Classes that came with a checkpoint are found among those that transformers has fetched.
    init_hf_modules()
    return broadcast_object_list([None])[0]


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


def outline(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose matrices are nowhere (on the meta device), small enough to be sent: buffers,
    biases and norms are there."""
    return _copy(model, lambda matrix: matrix.to("meta"))


def hollow(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the CPU, to be sharded, whose matrices hold nothing yet. They have addresses, which
    accelerate tells an optimiser's parameters apart by, but memory only once it is written."""
    return _copy(model, _untouched)


def _untouched(matrix: Tensor) -> Tensor:
    # numpy takes zeros from the system, which gives pages when they are written; torch writes them.
    zeros = torch.from_numpy(np.zeros(matrix.nbytes, np.uint8))
    return zeros.view(matrix.dtype).view(matrix.shape)


def _copy(model: PreTrainedModel, matrix: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A copy with other matrices; what is tied stays tied."""
    memo = {
        id(p): nn.Parameter(matrix(p.detach()), requires_grad=p.requires_grad)
        for p in model.parameters()
        if p.ndim > 1
    }
    return copy.deepcopy(model, memo)


def fill(sharded: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Gives each process its share of what is whole in the first one, a tensor at a time."""
    state = whole.state_dict() if processes().is_main_process else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(sharded, state, options=options)


def gathered(weight: Tensor) -> Tensor:
    """A weight as a whole, where FSDP has left only this process's part."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
