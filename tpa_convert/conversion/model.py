"""A source, its moments and a plan in; the source's own model with TPA attention out."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.conversion.layer import coded_attention_parameters, convert_layer
from tpa_convert.errors import UserError
from tpa_convert.plans import Plan
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source
from tpa_convert.sources.attention import attention_weights, query_norm_parameters


class Moments(Protocol):
    """`calibration.moments.Moments`: of the kind that the plan needs."""

    @property
    def layers(self) -> list[Any]: ...

    @property
    def num_tokens(self) -> int: ...

    def check(self, source_sha256: str, coded: bool) -> None: ...


@torch.no_grad()
def convert_model(
    source: Source,
    plan: Plan,
    moments: Moments | None,
    *,
    method: str = "gauge",
    whiten: bool = True,
    dtype: torch.dtype | None = None,
    track: Track = no_tracking,
) -> PreTrainedModel:
    """Converts every attention layer of `source`; everything else is copied.

    Args:
        source: the pretrained model.
        plan: shapes of the layers.
        moments: of the source on calibration text. Not needed without whitening, except by the
            `linear` form, whose head factors need to know the inputs.
        method: a key of `METHODS`.
        whiten: decompose what attention does (True) or the weights alone.
        dtype: of the result; the source's if None.
        track: shows progress over the layers.

    Returns: the converted model on the CPU, in eval mode.

    Raises:
        UserError: moments missing or of another source, or an attention with parameters that the
            family does not describe.
    """
    linear = any(layer.form == "linear" for layer in plan.layers)
    if moments is None and (whiten or linear or any(layer.coded for layer in plan.layers)):
        raise UserError(f"the {'linear form' if linear else method} needs calibration moments")
    if moments is not None:
        moments.check(source.reference.sha256, plan.is_coded)
    family, model = source.family, source.model
    family.check_names(model)
    dtype = dtype or model.dtype
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    layers = [getattr(layer, family.names.attention) for layer in decoder.layers]
    attention_prefixes = tuple(
        f"{prefix}.{family.names.layers}.{i}.{family.names.attention}." for i in range(len(layers))
    )
    state = {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
        for name, tensor in model.state_dict().items()
        if not name.startswith(attention_prefixes)
    }
    shapes = []
    for i, shape in enumerate(track(plan.layers, "converting")):
        weights = attention_weights(layers[i], family.names, model.config, i, device="cpu")
        if shape.coded:
            assert moments is not None
            parameters = coded_attention_parameters(
                weights, moments.layers[i], moments.num_tokens, shape
            )
        else:
            parameters, shape = convert_layer(
                weights,
                moments.layers[i] if moments else None,
                shape,
                method=method,
                whiten=whiten,
                rank_limit_k=plan.rank_limit_k,
            )
        parameters |= query_norm_parameters(layers[i], family.names, model.config, i)
        state |= {
            attention_prefixes[i] + name: tensor.to("cpu", dtype).contiguous()
            for name, tensor in parameters.items()
        }
        shapes.append(asdict(shape))
    config = family.tpa_config(model.config, shapes)
    config.tie_word_embeddings = has_tied_head(model)
    return build(family.causal_lm, config, state, model)


def build(
    model_class: type, config: Any, state: dict[str, Tensor], source: PreTrainedModel
) -> PreTrainedModel:
    """A model with these parameters, in eval mode; what it has of `source` is not copied again.

    Args:
        state: by name; biases that the model does not have are left out if they are zero.
        source: has the buffers that are in no state dict (rotary frequencies and the like).

    Raises:
        UserError: parameters missing, or such that have no place in the model.
    """
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict().keys()
    unread = [name for name in state.keys() - expected if state[name].any()]
    missing = sorted(expected - state.keys())
    if unread or missing:
        what, names = ("no place in", sorted(unread)) if unread else ("no value for", missing)
        raise UserError(
            f"{len(names)} tensors of the source have {what} the converted model (the first: "
            f"{names[0]}): register a family that describes its attention"
        )
    model.load_state_dict({name: state[name] for name in expected}, assign=True)
    buffers = dict(source.named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffers[name].detach().clone().cpu())
    model.tie_weights()
    if source.generation_config is not None:
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the loaded head is the embedding. The config may claim it of a head of its own."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight
