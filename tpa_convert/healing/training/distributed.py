"""Several processes, one GPU each, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

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
from torch.utils import swap_tensors
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import init_hf_modules

from tpa_convert.errors import UserError

# The first process may sample text while the others wait; a launcher ends them if it dies.
TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


def processes() -> PartialState:
    """This process among those of the run, which are joined on the first call."""
    # `shard` instead: accelerate's way fails for models with buffers in their state, as coded ones.
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


def outline(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose matrices are nowhere (on the meta device), small enough to be sent: buffers,
    biases and norms are there. What is tied stays tied."""
    memo = {id(p): _nowhere(p) for p in model.parameters() if p.ndim > 1}
    return copy.deepcopy(model, memo)


def _nowhere(matrix: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(matrix.detach().to("meta"), requires_grad=matrix.requires_grad)


def shard(
    accelerator: Accelerator, outlined: PreTrainedModel, whole: PreTrainedModel, bf16: bool
) -> PreTrainedModel:
    """Turn the outline of a model, in place, into one that all processes share, layer by layer.

    Its weights are those that `whole` has in the first process, which gives them up: it is an
    outline afterwards, too. One matrix at a time is anywhere else as a whole.

    Args:
        bf16: whether gathered weights are bfloat16. Gradients are added up in fp32 in any case.
    """
    _set_wrapping(accelerator, outlined, bf16)
    model = fsdp2_prepare_model(accelerator, outlined)
    # FSDP leaves on the meta device what is there; the rest is where it keeps its shards.
    kept = next((p.device for p in model.parameters() if not p.is_meta), accelerator.device)
    model._apply(lambda x: torch.empty_like(x, device=kept) if x.is_meta else x)
    state = whole.state_dict() if processes().is_main_process else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    for parameter in whole.parameters():
        if parameter.ndim > 1:
            swap_tensors(parameter, _nowhere(parameter))
    return model


def _set_wrapping(accelerator: Accelerator, model: PreTrainedModel, bf16: bool) -> None:
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


@torch.no_grad()
def collect(sharded: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Give the first process all weights back, as they are now, in main memory: it undoes what
    `shard` did to `whole`, a tensor at a time."""
    wholes = whole.state_dict(keep_vars=True)
    for name, part in sharded.state_dict().items():
        full = gathered(part)
        if not processes().is_main_process:
            continue
        if wholes[name].is_meta:
            requires_grad = wholes[name].requires_grad
            swap_tensors(wholes[name], nn.Parameter(full.cpu(), requires_grad=requires_grad))
        else:
            wholes[name].copy_(full)


def gathered(weight: Tensor) -> Tensor:
    """A weight as a whole, where FSDP has left only this process's part."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
