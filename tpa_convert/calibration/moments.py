"""Second moments of every layer on calibration text: one streamed pass, kept in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tpa_convert.coding import CacheMoments
from tpa_convert.decomposition import AttentionWeights, LayerMoments
from tpa_convert.decomposition.factors import to_complex_pairs
from tpa_convert.decomposition.moments import constant_functional
from tpa_convert.errors import UserError
from tpa_convert.forward.walk import DecoderWalk
from tpa_convert.modeling import pair_table
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source, held
from tpa_convert.sources.attention import attention_weights
from tpa_convert.storage import Store

Kind = type[LayerMoments] | type[CacheMoments]


def as_tensors(layer: LayerMoments | CacheMoments) -> dict[str, Tensor]:
    """The moments of a layer by name, complex numbers as pairs."""
    values = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return {
        name: (torch.view_as_real(value) if value.is_complex() else value).cpu().contiguous()
        for name, value in values.items()
    }


def of_tensors(kind: Kind, tensors: dict[str, Tensor]) -> Any:
    """The other way, fp64."""
    values = {name: tensor.double() for name, tensor in tensors.items()}
    for name in kind.complex_fields:
        # A copy: numbers mapped from a file need not lie where LAPACK wants complex ones.
        values[name] = torch.view_as_complex(values[name].clone())
    return kind(**values)


class StoredLayers(Sequence[Any]):
    """The moments of all layers in a store, of which one is read when it is asked for."""

    def __init__(self, store: Store, kind: Kind, count: int):
        self._store, self._kind, self._size = store, kind, count

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._size:
            raise IndexError(index)
        return of_tensors(self._kind, self._store[moments_name(index)])


def moments_name(index: int) -> str:
    """Of a layer's moments in a store."""
    return f"moments-{index:05}"


def go_on(walk: DecoderWalk, store: Store) -> int:
    """Takes a walk to the last layer whose inputs are in a store, and says which that is."""
    done = max((i for i in range(len(walk.layers)) if inputs_name(i) in store), default=0)
    if done:
        walk.states.copy_(store[inputs_name(done)]["states"])
    return done


def inputs_name(index: int) -> str:
    """Of the hidden states before a layer in a store."""
    return f"inputs-{index:05}"


@dataclass(frozen=True)
class Moments:
    """Moments of all layers of one source.

    Args:
        layers: one `LayerMoments` per layer, or for a coded cache one `CacheMoments`, float64.
        source_sha256: hash of the source's weights.
        num_tokens: calibration tokens seen.
    """

    layers: Sequence[Any]
    source_sha256: str
    num_tokens: int

    def save(self, path: Path) -> None:
        """Writes a safetensors file, float32, complex numbers as pairs."""
        tensors = {
            f"layers.{i}.{name}": value.float()
            for i, layer in enumerate(self.layers)
            for name, value in as_tensors(layer).items()
        }
        metadata = {"source_sha256": self.source_sha256, "num_tokens": str(self.num_tokens)}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Moments:
        """Reads what `save` wrote. Raises `UserError` if the file is missing or something else."""
        if not path.is_file():
            raise UserError(f"no moments file at {path}: make one with --save-moments {path}")
        try:
            layers = _FileLayers(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable moments file: {error}") from error
        metadata = layers.metadata
        return cls(layers, metadata["source_sha256"], int(metadata["num_tokens"]))

    def check(self, source_sha256: str, coded: bool) -> None:
        """Raises `UserError` unless these are of this source, and for such a cache."""
        if self.source_sha256 != source_sha256:
            raise UserError(
                "the moments file was made from another source: calibrate again with --save-moments"
            )
        if coded != isinstance(self.layers[0], CacheMoments):
            made, wanted = "of 16 bits", "coded in bits"
            made, wanted = (made, wanted) if coded else (wanted, made)
            raise UserError(
                f"the moments file was made for a cache {made}, and this one is {wanted}: "
                "calibrate again with --save-moments, or change --cache-bits"
            )


class _FileLayers(Sequence[Any]):
    """The moments of all layers in a file, of which one is read when it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, framework="pt") as file:
            self.metadata = file.metadata() or {}
            names = set(file.keys())
        if "source_sha256" not in self.metadata:
            raise UserError(f"{path} holds no moments: make a file with --save-moments")
        self.kind: Kind = CacheMoments if "layers.0.sink_mean" in names else LayerMoments
        self.size = 1 + max(int(key.split(".")[1]) for key in names)
        if not names >= {name for i in range(self.size) for name in self._names(i).values()}:
            raise UserError(
                f"{path} was written by another version: make a new file with --save-moments"
            )

    def _names(self, index: int) -> dict[str, str]:
        return {field.name: f"layers.{index}.{field.name}" for field in fields(self.kind)}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        with safe_open(self.path, framework="pt") as file:
            tensors = {name: file.get_tensor(key) for name, key in self._names(index).items()}
        return of_tensors(self.kind, tensors)


class MomentAccumulator:
    """Sums the moments of one layer over batches, float64.

    Only every `query_stride`-th position is taken as a query: neighbouring queries attend alike,
    and the cost of the attention-weighted sums falls by that factor.
    """

    kind = LayerMoments

    def __init__(self, weights: AttentionWeights, query_stride: int):
        self.weights, self.query_stride = weights, query_stride
        self.sums: dict[str, Tensor] = {}
        self.queries = 0

    def add(self, name: str, value: Tensor) -> None:
        """Adds to a named sum."""
        self.sums[name] = self.sums.get(name, 0) + value.to(
            torch.complex128 if value.is_complex() else torch.float64
        )

    def update(self, inputs: Tensor, rotation: Tensor, offset: int) -> None:
        """Adds one batch.

        Args:
            inputs: attention inputs x, [b, t, D].
            rotation: e^{iθ_f t} (times the source's RoPE scaling), complex [t, f].
            offset: first query position.
        """
        weights = self.weights
        inputs = torch.cat((inputs, torch.ones_like(inputs[..., :1])), dim=-1)
        positions = torch.arange(offset, inputs.shape[1], self.query_stride, device=inputs.device)
        query = torch.einsum("bsx,hdx->bshd", inputs[:, positions], weights.query)
        key = torch.einsum("btx,gdx->btgd", inputs, weights.key)
        value = torch.einsum("btx,gdx->btgd", inputs, weights.value).flatten(2)
        query = query if weights.query_norm is None else weights.query_norm(query)
        query = query.transpose(1, 2)
        scale = (
            torch.ones_like(key[..., :1])
            if weights.key_norm is None
            else (weights.key_norm.scale(key))
        )

        query_pairs = to_complex_pairs(query, -1) * rotation[positions]
        key_pairs = to_complex_pairs(key, -1) * rotation[:, None]
        attention = self.attention(query_pairs, scale * key_pairs, positions)
        self.add_all(inputs, query_pairs, key_pairs, key, scale, value, attention)
        self.queries += attention.shape[0] * attention.shape[2]

    def add_all(
        self,
        inputs: Tensor,
        query_pairs: Tensor,
        key_pairs: Tensor,
        key: Tensor,
        scale: Tensor,
        value: Tensor,
        attention: Tensor,
    ) -> None:
        """Adds every moment of one batch.

        Args:
            inputs: homogeneous, [b, t, D + 1].
            query_pairs, key_pairs: rotated, complex [b, h, s, f] and [b, t, g, f].
            key: before rotation, [b, t, g, d].
            scale: of the norm of the keys, [b, t, g or 1, 1]; ones without one.
            value: all heads together, [b, t, g d].
            attention: p, [b, h, s, t].
        """
        weights = self.weights
        mean_attention = attention.mean(1)
        token_weight = mean_attention.sum(1)[..., None, None]  # [b, t, 1, 1]

        # What a token's keys count by: the norm scales each head, a component only all heads.
        token_scale = scale.square().mean(2, keepdim=True).sqrt()  # [b, t, 1, 1]
        key_pairs, scaled_key = token_scale * key_pairs, (token_scale * key).flatten(2)
        mean_pairs = torch.einsum("bst,btgf->bsgf", mean_attention.to(key_pairs.dtype), key_pairs)
        self.add("pair_covariance", covariance_of_pairs(key_pairs, token_weight * key_pairs))
        self.add("pair_covariance", -covariance_of_pairs(mean_pairs, mean_pairs))
        mean_key = (mean_attention @ scaled_key).flatten(0, 1)
        weighted_key = (token_weight[..., 0] * scaled_key).flatten(0, 1)
        moment = weighted_key.mT @ scaled_key.flatten(0, 1)
        self.add("key_covariance", moment - mean_key.mT @ mean_key)
        weighted_scale = token_weight * token_scale
        self.add("key_mean", (weighted_scale[..., 0] * scaled_key).sum((0, 1)))
        self.add("key_weight", (weighted_scale * token_scale).sum())
        energy = query_pairs.abs().square().sum((0, 2)).unflatten(0, (-1, weights.heads_per_group))
        self.add("query_energy", energy.sum(1))
        self.add("head_weight", (token_weight * scale.square()).sum((0, 1)))  # [g or 1, 1]
        mixed = (attention @ value[:, None]).flatten(0, 2)
        heads = attention.shape[1]
        self.add("value_covariance", mixed.mT @ mixed / heads)
        weighted_inputs = (token_weight[..., 0] * inputs).flatten(0, 1)
        self.add("input_moment", weighted_inputs.mT @ inputs.flatten(0, 1))

    def attention(self, query_pairs: Tensor, key_pairs: Tensor, positions: Tensor) -> Tensor:
        """Causal attention weights p, [b, h, s, t], float32, within the layer's window."""
        query = torch.view_as_real(query_pairs).flatten(-2)
        key = torch.view_as_real(key_pairs).flatten(-2).transpose(1, 2)
        key = key.repeat_interleave(self.weights.heads_per_group, dim=1)
        scores = query @ key.mT * self.weights.scale
        if self.weights.softcap is not None:
            scores = self.weights.softcap * torch.tanh(scores / self.weights.softcap)
        distance = positions[:, None] - torch.arange(scores.shape[-1], device=scores.device)
        hidden = distance < 0
        if self.weights.window is not None:
            hidden |= distance >= self.weights.window
        return scores.masked_fill_(hidden, -torch.inf).softmax(-1)

    def finish(self) -> LayerMoments:
        """The moments: sums over the number of queries."""
        means = {name: total.cpu() / self.queries for name, total in self.sums.items()}
        key_weight = means.pop("key_weight")
        means["key_mean"] = means["key_mean"] / key_weight
        # Heads whose norm scales them more than others weigh more in the scores.
        means["query_energy"] = means["query_energy"] * (means.pop("head_weight") / key_weight)
        second_moment = means.pop("input_moment")  # homogeneous: the last column is the mean
        functional, residual = constant_functional(second_moment[:-1, :-1], second_moment[:-1, -1])
        return LayerMoments(**means, constant_functional=functional, constant_residual=residual)


def covariance_of_pairs(left: Tensor, right: Tensor) -> Tensor:
    """Σ left_g conj(right_h) over batch and tokens per rotary pair.

    Args:
        left, right: complex [b, t, g, f].

    Returns: complex [f, g, g].
    """
    left = left.flatten(0, 1).permute(2, 1, 0)
    right = right.flatten(0, 1).permute(2, 1, 0)
    return left @ right.mH


@torch.no_grad()
def collect_moments(
    source: Source,
    blocks: Tensor,
    *,
    batch_size: int = 4,
    query_stride: int = 4,
    track: Track = no_tracking,
    store: Store | None = None,
) -> Moments:
    """Moments of every layer of `source` on `blocks`, one layer in flight at a time.

    Args:
        source: the model to convert.
        blocks: token ids, int64 [N, length].
        batch_size: blocks per step.
        query_stride: distance of the positions taken as queries.
        track: shows progress over the layers, called as `track(layers, description)`.
        store: gets the moments, and the hidden states before the layer that is next: what is in it
            already, from a run that was cut short, is not done again.
    """
    source.family.check_names(source.model)
    names = source.family.names
    store = {} if store is None else store
    count = len(source.model.get_decoder().layers)
    moments = Moments(
        StoredLayers(store, MomentAccumulator.kind, count), source.reference.sha256, blocks.numel()
    )
    if moments_name(count - 1) in store:
        return moments
    walk = DecoderWalk(source.model, blocks, batch_size, names.attention)
    for i in track(range(go_on(walk, store), count), "calibrating"):
        with held(walk.layers[i]):
            weights = attention_weights(
                walk.attention(i), names, source.model.config, i, dtype=torch.float32
            )
            accumulator = MomentAccumulator(weights, query_stride)
            pairs, order = weights.key.shape[1] // 2, names.table_order(walk.attention(i))
            for b, call in enumerate(walk.observe(i)):
                cos, sin = pair_table(call.keywords["position_embeddings"], pairs, order)
                rotation = torch.complex(cos[0, 0].float(), sin[0, 0].float())
                accumulator.update(call.hidden.float(), rotation, b % query_stride)
        store[moments_name(i)] = as_tensors(accumulator.finish())
        store[inputs_name(i + 1)] = {"states": walk.states.cpu()}
        store.pop(inputs_name(i), None)
    del store[inputs_name(count)]
    return moments
