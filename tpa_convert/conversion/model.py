"""A source, its moments and a plan in; the source's own model with TPA attention out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.conversion.layer import (
    attention_module,
    coded_attention_parameters,
    convert_layer,
)
from tpa_convert.errors import UserError
from tpa_convert.modeling import LayerShape, TPAAttention
from tpa_convert.plans import Plan
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source, device_of, held
from tpa_convert.sources.attention import attention_weights, query_norm_parameters


class Moments(Protocol):
    """`calibration.moments.Moments`: of the kind that the plan needs."""

    @property
    def layers(self) -> Sequence[Any]: ...

    @property
    def num_tokens(self) -> int: ...

    def check(self, source_sha256: str, coded: bool) -> None: ...


class Part(NamedTuple):
    """One part of a converted model.

    Attributes:
        tensors: by their names in the model, contiguous, on the CPU.
        shape: of its attention; None of what is not a decoder layer.
    """

    tensors: dict[str, Tensor]
    shape: LayerShape | None


class Conversion:
    """A source on its way to a TPA model, one part at a time: what stands before the decoder
    layers, each of these, and what stands behind. What is not attention is copied.

    Attributes:
        description: of making a part.
        tied: tensors of the source that are another one: they are in no part.
    """

    description = "converting"

    def __init__(
        self,
        source: Source,
        plan: Plan,
        moments: Moments | None,
        *,
        method: str = "gauge",
        whiten: bool = True,
        dtype: torch.dtype | None = None,
    ):
        """
        Args:
            source: the pretrained model.
            plan: shapes of the layers.
            moments: of the source on calibration text. Not needed without whitening, except by the
                `linear` form, whose head factors need to know the inputs.
            method: a key of `METHODS`.
            whiten: decompose what attention does (True) or the weights alone.
            dtype: of the result; the source's if None.

        Raises:
            UserError: moments missing or of another source, or an attention with parameters that
                the family does not describe.
        """
        linear = any(layer.form == "linear" for layer in plan.layers)
        if moments is None and (whiten or linear or any(layer.coded for layer in plan.layers)):
            raise UserError(f"the {'linear form' if linear else method} needs calibration moments")
        if moments is not None:
            moments.check(source.reference.sha256, plan.is_coded)
        family, model = source.family, source.model
        family.check_names(model)
        self.source, self.plan, self.moments = source, plan, moments
        self.method, self.whiten, self.dtype = method, whiten, dtype or model.dtype
        decoder = model.get_decoder()
        prefix = next(name for name, module in model.named_modules() if module is decoder)
        self._layers = list(decoder.layers)
        self._prefixes = [f"{prefix}.{family.names.layers}.{i}." for i in range(len(self._layers))]
        owners: dict[int, str] = {}
        self.tied: dict[str, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            owner = owners.setdefault(id(tensor), name)
            if owner != name:
                self.tied[name] = owner
        self._names = self._sorted(owners.values())
        with torch.device("meta"):
            converted = family.causal_lm(self.config(plan.layers))
        self._expected = self._sorted(converted.state_dict().keys() - self.tied.keys())

    def __len__(self) -> int:
        return len(self._layers) + 2

    def _sorted(self, names: Iterable[str]) -> list[list[str]]:
        """Names of tensors by the part that they are in."""
        parts: list[list[str]] = [[] for _ in range(len(self))]
        for name in names:
            inside = next((i for i, p in enumerate(self._prefixes) if name.startswith(p)), None)
            # An embedding may be as large as several layers: it is in another part than the head.
            embedding = self.source.model.get_input_embeddings()
            if inside is not None:
                parts[inside + 1].append(name)
            elif self.source.model.get_submodule(name.rpartition(".")[0]) is embedding:
                parts[0].append(name)
            else:
                parts[-1].append(name)
        return parts

    @torch.no_grad()
    def part(self, index: int) -> Part:
        """Converts one part.

        Raises:
            UserError: tensors of the source that have no place in the converted model, or others
                that it lacks.
        """
        names = self._names[index]
        if not 0 < index < len(self) - 1:
            return self._finished(index, self.source.tensors(names), None)
        parameters, shape = self.attention(index - 1, self.dtype)
        return self.layer(index - 1, parameters, shape)

    @torch.no_grad()
    def attention(self, index: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], LayerShape]:
        """Parameters of the attention that layer `index` gets, on the CPU, by their names in it,
        and its shape.

        Raises:
            UserError: as `part`.
        """
        names, config = self.source.family.names, self.source.model.config
        attention: Any = getattr(self._layers[index], names.attention)
        with held(attention):
            parameters, shape = self._attention(attention, index)
            parameters |= query_norm_parameters(attention, names, config, index)
            # What they were computed in takes several times the memory. The type first: a GPU
            # sends a quarter of the bytes.
            parameters = {name: tensor.to(dtype).cpu() for name, tensor in parameters.items()}
        prefix = self._attention_prefix(index)
        expected = [name for name in self._expected[index + 1] if name.startswith(prefix)]
        wanted = fitting({prefix + name: tensor for name, tensor in parameters.items()}, expected)
        return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}, shape

    @contextmanager
    def in_place(self, index: int) -> Iterator[tuple[TPAAttention, LayerShape]]:
        """The converted attention of layer `index` in fp32, and its shape. Inside of this it is in
        the source's own decoder, whose layer is then what that of the converted model would be."""
        source, layer = self.source, self._layers[index]
        names, model = source.family.names, source.model
        with held(layer), torch.no_grad():
            parameters, shape = self.attention(index, torch.float32)
            shapes = [asdict(shape)] * len(self._layers)
            config = source.family.tpa_config(model.config, shapes)
            before = getattr(layer, names.attention)
            module = attention_module(before, names, config, index, parameters)
            setattr(layer, names.attention, module.to(device_of(model)))
            try:
                yield module, shape
            finally:
                setattr(layer, names.attention, before)

    @torch.no_grad()
    def layer(self, index: int, attention: dict[str, Tensor], shape: LayerShape) -> Part:
        """The part that is layer `index`, with these parameters of its attention.

        Raises:
            UserError: as `part`.
        """
        prefix = self._attention_prefix(index)
        parameters = {prefix + name: t.to("cpu", self.dtype) for name, t in attention.items()}
        others = (name for name in self._names[index + 1] if not name.startswith(prefix))
        return self._finished(index + 1, self.source.tensors(others) | parameters, shape)

    def _attention_prefix(self, index: int) -> str:
        return f"{self._prefixes[index]}{self.source.family.names.attention}."

    def _attention(self, attention: Any, index: int) -> tuple[dict[str, Tensor], LayerShape]:
        """Parameters of a layer's attention, and its shape as its factors decide."""
        shape = self.plan.layers[index]
        # Components of a coded cache are eigenvectors, of thousands of rows in large models.
        device = device_of(self.source.model) if shape.coded else "cpu"
        weights = attention_weights(
            attention, self.source.family.names, self.source.model.config, index, device=device
        )
        moments: Any = None if self.moments is None else self.moments.layers[index]
        if shape.coded:
            assert self.moments is not None
            tokens = self.moments.num_tokens
            return coded_attention_parameters(weights, moments, tokens, shape), shape
        return convert_layer(
            weights,
            moments,
            shape,
            method=self.method,
            whiten=self.whiten,
            rank_limit_k=self.plan.rank_limit_k,
        )

    def _finished(self, index: int, tensors: dict[str, Tensor], shape: LayerShape | None) -> Part:
        """A part in its type, with just what the converted model has."""
        wanted = fitting(tensors, self._expected[index])
        for name, tensor in wanted.items():
            dtype = self.dtype if tensor.is_floating_point() else None
            wanted[name] = tensor.to("cpu", dtype).contiguous()
        return Part(wanted, shape)

    def config(self, shapes: Sequence[LayerShape]) -> Any:
        """Config of the converted model with such layers."""
        model = self.source.model
        config = self.source.family.tpa_config(model.config, [asdict(shape) for shape in shapes])
        config.tie_word_embeddings = has_tied_head(model)
        return config

    def empty_model(self, shapes: Sequence[LayerShape]) -> PreTrainedModel:
        """The converted model with such layers, its weights nowhere."""
        model = _empty(self.source.family.causal_lm, self.config(shapes), self.source.model)
        return model.to(self.dtype)


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
    """All parts of a `Conversion`, whose arguments these are, in memory as a model.

    Args:
        track: shows progress over the layers.

    Returns: the converted model on the CPU, in eval mode; it shares no memory with the source.

    Raises:
        UserError: as `Conversion`.
    """
    conversion = Conversion(source, plan, moments, method=method, whiten=whiten, dtype=dtype)
    state: dict[str, Tensor] = {}
    shapes: list[LayerShape] = []
    for index in track(range(len(conversion)), "converting"):
        part = conversion.part(index)
        state |= {name: tensor.clone() for name, tensor in part.tensors.items()}
        shapes += [part.shape] if part.shape else []
    state |= {name: state[owner] for name, owner in conversion.tied.items()}
    return build(source.family.causal_lm, conversion.config(shapes), state, source.model)


def fitting(tensors: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Those that a converted model has, in its order. Biases that it does not have are left out if
    they are zero.

    Raises:
        UserError: tensors missing, or such that have no place in the model.
    """
    expected = list(expected)
    unread = [name for name in tensors.keys() - set(expected) if tensors[name].any()]
    missing = sorted(set(expected) - tensors.keys())
    if unread or missing:
        what, names = ("no place in", sorted(unread)) if unread else ("no value for", missing)
        raise UserError(
            f"{len(names)} tensors of the source have {what} the converted model (the first: "
            f"{names[0]}): register a family that describes its attention"
        )
    return {name: tensors[name] for name in expected}


def build(
    model_class: type, config: Any, state: dict[str, Tensor], source: PreTrainedModel
) -> PreTrainedModel:
    """A model with these parameters, in eval mode; what it has of `source` is not copied again.

    Args:
        state: by name, as `fitting` takes it.
        source: has the buffers that are in no state dict (rotary frequencies and the like).

    Raises:
        UserError: as `fitting`.
    """
    model = _empty(model_class, config, source)
    model.load_state_dict(fitting(state, model.state_dict()), assign=True)
    buffers = dict(source.named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffers[name].detach().clone().cpu())
    model.tie_weights()
    return model.eval()


def _empty(model_class: Any, config: Any, source: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    if source.generation_config is not None:
        model.generation_config = copy.deepcopy(source.generation_config)
    return model


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the loaded head is the embedding. The config may claim it of a head of its own."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight
