"""Low-rank adapters on what is not trained in full, by peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from tpa_convert.errors import UserError
from tpa_convert.forward.walk import attention_modules


@contextmanager
def mlp_adapters(model: PreTrainedModel, rank: int, seed: int) -> Iterator[None]:
    """Put LoRA adapters (arXiv 2106.09685) on what layers have besides attention, such as MLPs; on
    leaving, merge them into the weights.

    They are the only trainable parameters inside the block until others are made so.

    Args:
        model: changed in place, and of its old structure again afterwards.
        rank: of the adapters; their scale is 2, as is usual.
        seed: of their first weights, which all processes have to share.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError:
        raise UserError("trainable lora needs peft: pip install 'tpa-convert[lora]'") from None
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(_adapted(model)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapters = LoraModel(model, config, "default")
    try:
        yield
    finally:
        adapters.merge_and_unload()
        vars(model).pop("peft_config", None)  # older versions leave it


def adapter_parameters(model: PreTrainedModel, rank: int) -> int:
    """How many numbers the adapters have that a model would get."""
    return sum(rank * (x.in_features + x.out_features) for x in _adapted(model).values())


def _adapted(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """What gets adapters, by name."""
    attention = {m for module in attention_modules(model) for m in module.modules()}
    adapted = set(model.get_decoder().layers.modules()) - attention
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module in adapted
    }


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(part.startswith("lora_") for part in name.split("."))
