"""A source whose weights stay in their files until they are needed."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from tpa_convert.families.family import family_of
from tpa_convert.sources.checkpoint import find_checkpoint
from tpa_convert.sources.load import (
    LANGUAGE_MODEL,
    Source,
    SourceReference,
    check_names,
    checkpoint_config,
    load_source,
    transformers_errors,
)
from tpa_convert.sources.on_demand import read_on_demand
from tpa_convert.sources.quiet import quiet
from tpa_convert.sources.tokenizer import tokenizer_of
from tpa_convert.sources.weights import StoredWeights


def open_source(
    spec: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Source:
    """As `load_source`, but each part of the model is read from its files when it is needed. A GGUF
    file, which has to be de-quantised, is loaded whole.

    Args:
        dtype: of all parameters while they are in memory.

    Raises:
        UserError: as `load_source`; numbers that are not finite are found when they are read.
    """
    checkpoint = find_checkpoint(spec, revision=revision, trust_remote_code=trust_remote_code)
    if checkpoint.gguf_file is not None:
        return load_source(spec, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    config = checkpoint_config(checkpoint, trust_remote_code)
    checkpoint.check_weight_files()
    with quiet(), transformers_errors(checkpoint):
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=family_of(config).attention_implementation,
                trust_remote_code=trust_remote_code,
            )
        model.tie_weights()
        with contextlib.suppress(OSError):  # without a file, it is made of the model's config
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    weights = StoredWeights(checkpoint, model, LANGUAGE_MODEL)
    _share_tied(model, weights)
    missing = sorted(model.state_dict().keys() - weights.shapes.keys() - weights.same_as.keys())
    check_names(checkpoint, missing, weights.unexpected)
    family = family_of(model.config)
    _read_parts_on_demand(model, weights, dtype, torch.device(device))
    reference = SourceReference(checkpoint.id, checkpoint.revision, checkpoint.sha256(), None)
    return Source(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer_of(checkpoint, config, trust_remote_code),
        family=family,
        reference=reference,
        weights=weights,
    )


def _share_tied(model: PreTrainedModel, weights: StoredWeights) -> None:
    """Tensors that the config says are one are read as one, unless the files hold different ones:
    then they are given to the model as two."""
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    for names in tied.values():
        stored = [name for name in names if name in weights.shapes]
        for name in names if stored else []:
            if name not in stored:
                weights.same_as[name] = stored[0]
            elif name != stored[0]:
                one, other = (weights.read([n])[n] for n in (stored[0], name))
                if not torch.equal(one, other):
                    owner, _, leaf = name.rpartition(".")
                    module = model.get_submodule(owner)
                    own = nn.Parameter(torch.empty_like(getattr(module, leaf)))
                    setattr(module, leaf, own)


def _read_parts_on_demand(
    model: PreTrainedModel, weights: StoredWeights, dtype: torch.dtype, device: torch.device
) -> None:
    """Makes parts of the decoder layers, of the attention in each, and of all modules outside of
    them that have tensors and no modules; what has both stays in memory."""
    names = {module: name for name, module in model.named_modules()}
    layers = list(model.get_decoder().layers)
    attention = {getattr(layer, family_of(model.config).names.attention) for layer in layers}
    inside = {module for layer in layers for module in layer.modules()}

    def read(prefix: str, own: list[str]) -> dict[str, Tensor]:
        tensors = weights.read((prefix + name for name in own), device)
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in ((name, tensors[prefix + name]) for name in own)
        }

    for module, name in names.items():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[leaf] = buffer.to(device)
        if module in inside and module not in layers and module not in attention:
            continue
        prefix = f"{name}." if name else ""
        is_part = module in inside or not any(module.children())
        own = [n for n in module.state_dict() if is_part or "." not in n]
        if own and is_part:
            when_called = module not in attention
            read_on_demand(module, partial(read, prefix, own), device, when_called=when_called)
        elif own:
            state = {n: tensor.to(device) for n, tensor in read(prefix, own).items()}
            module.load_state_dict(state, strict=False, assign=True)
