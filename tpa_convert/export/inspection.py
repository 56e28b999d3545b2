"""What a converted model is, from the files of its directory: no weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import safe_open

from tpa_convert.dtypes import named_dtype
from tpa_convert.errors import UserError
from tpa_convert.evaluation import EvaluationReport
from tpa_convert.export.output import PROVENANCE_FILE
from tpa_convert.export.save import Provenance, read_provenance
from tpa_convert.modeling import LayerShape, source_head_dim
from tpa_convert.modeling.legacy import TPAConfig
from tpa_convert.places.models import check_converted
from tpa_convert.sources.checkpoint import Checkpoint


@dataclass(frozen=True)
class Weights:
    """The files of the weights, as their headers describe them.

    Attributes:
        files: how many there are.
        size: of all together, in bytes.
        parameters: numbers in them; what is tied counts once.
    """

    files: int
    size: int
    parameters: int


@dataclass(frozen=True)
class HealingStep:
    """One healing that a model went through.

    Attributes:
        tokens: it was trained on.
        losses: (tokens, mean loss on the training text since the point before).
        curve: (tokens, perplexity on held-out text) in the course of it, if there was such text.
        divergences: (tokens, KL from the source there).
        source_perplexity: of the source on that text.
        settings: of the run.
    """

    tokens: int
    losses: tuple[tuple[int, float], ...]
    curve: tuple[tuple[int, float], ...]
    divergences: tuple[tuple[int, float], ...]
    source_perplexity: float | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Inspection:
    """A converted model as its directory describes it.

    Attributes:
        directory: where it is.
        model_type: of its config; "tpa" for those of version 0.1.
        dtype: of the weights; bytes of the cache are counted in it.
        layers: the fields of each layer as the config has them.
        shapes: the same, checked.
        kv_heads: key-value heads of the source.
        source_kv_bytes: cached per token by the source, all layers.
        rows: bytes that each layer caches per token, of keys and of values.
        weights: their files.
        provenance: how it was made; None for a model that something else saved again.
        layer_nats: loss that the codes of each layer are expected to cause, nats a token; empty
            where that is not recorded.
        layer_errors: error of the attention of each layer before and after its refit or refinement,
            relative to the size of what it adds to; empty likewise.
        healings: the first one first.
        evaluation: what was measured of it, if its card has results.
    """

    directory: Path
    model_type: str
    dtype: str
    layers: Sequence[Mapping[str, Any]]
    shapes: Sequence[LayerShape]
    kv_heads: int
    source_kv_bytes: int
    rows: Sequence[tuple[int, int]]
    weights: Weights
    provenance: Provenance | None
    layer_nats: Sequence[float]
    layer_errors: Sequence[tuple[float, float]]
    healings: Sequence[HealingStep]
    evaluation: EvaluationReport | None

    @property
    def name(self) -> str:
        """Of the directory."""
        return self.directory.resolve().name

    @property
    def layer_bytes(self) -> list[int]:
        """Cached per token by each layer."""
        return [sum(row) for row in self.rows]

    @property
    def kv_bytes(self) -> int:
        """Cached per token, all layers."""
        return sum(self.layer_bytes)

    @property
    def source(self) -> str | None:
        """What it was converted from."""
        if self.provenance is None:
            return None
        record = self.provenance["source"]
        return record["id"] + (f" ({record['revision'][:12]})" if record["revision"] else "")

    def to_json(self) -> dict[str, Any]:
        """Plain values; `layers` has one entry for each layer."""
        return {
            "directory": str(self.directory),
            "model_type": self.model_type,
            "dtype": self.dtype,
            "kv_bytes": self.kv_bytes,
            "source_kv_bytes": self.source_kv_bytes,
            "kv_floats": [shape.cached_floats(self.kv_heads) for shape in self.shapes],
            "parameters": self.weights.parameters,
            "weight_bytes": self.weights.size,
            "weight_files": self.weights.files,
            "layers": [
                {**layer, "kv_bytes": count}
                for layer, count in zip(self.layers, self.layer_bytes, strict=True)
            ],
            "healings": [vars(step) for step in self.healings],
            "provenance": self.provenance,
        }


def inspect(directory: str | Path) -> Inspection:
    """Describe a converted model, also one of version 0.1, from its config, the headers of its
    weights and its record.

    Raises:
        UserError: there is no converted model in `directory`, or a file of it is damaged.
    """
    check_converted(directory)
    directory = Path(directory)
    checkpoint = Checkpoint(str(directory), str(directory.resolve()), directory)
    config = checkpoint.read_config()
    try:
        layers = _layers(config)
        shapes = [LayerShape(**layer) for layer in layers]
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        head_dim = source_head_dim(SimpleNamespace(**config))
    except (KeyError, TypeError) as error:
        raise UserError(f"{directory}: config.json is damaged ({error}): convert again") from error
    dtype = named_dtype(config.get("dtype") or config.get("torch_dtype") or "float32")
    recorded = (directory / PROVENANCE_FILE).is_file()
    provenance = read_provenance(directory) if recorded else None
    results = (provenance or {}).get("evaluate")
    conversion = (provenance or {}).get("convert", {})
    return Inspection(
        directory=directory,
        model_type=config["model_type"],
        dtype=str(dtype).removeprefix("torch."),
        layers=layers,
        shapes=shapes,
        kv_heads=heads,
        source_kv_bytes=2 * heads * head_dim * len(layers) * dtype.itemsize,
        rows=[cached_bytes(shape, heads, dtype.itemsize) for shape in shapes],
        weights=_weights(checkpoint),
        provenance=provenance,
        layer_nats=conversion.get("layer_nats", ()),
        layer_errors=conversion.get("layer_errors", ()),
        healings=_healings(provenance),
        evaluation=EvaluationReport.from_json(results["report"]) if results else None,
    )


def cached_bytes(shape: LayerShape, kv_heads: int, itemsize: int) -> tuple[int, int]:
    """Bytes that a layer caches per token, of keys and of values."""
    if shape.coded:
        return shape.key_layout.row_bytes, shape.value_layout.row_bytes
    keys = shape.width_k + shape.key_head_factors(kv_heads)
    return keys * itemsize, (shape.cached_floats(kv_heads) - keys) * itemsize


def _layers(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of each layer, whoever wrote the config."""
    if config["model_type"] == "tpa":
        return TPAConfig.from_dict(dict(config)).shapes({})
    layers = config["tpa_layers"]
    return [layers] * config["num_hidden_layers"] if isinstance(layers, dict) else layers


def _weights(checkpoint: Checkpoint) -> Weights:
    files = checkpoint.weight_files()
    parameters = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
        except (
            Exception
        ) as error:  # safetensors has an exception of its own for each kind of damage
            raise checkpoint.error(f"{file.name} is damaged ({error}): convert again") from error
        parameters += sum(map(prod, shapes))
    return Weights(len(files), sum(file.stat().st_size for file in files), parameters)


def _healings(provenance: Provenance | None) -> tuple[HealingStep, ...]:
    steps = []
    record = (provenance or {}).get("heal")
    while record is not None:
        report, settings = record["report"], record["settings"]
        per_step = report["tokens"] / max(report["steps"], 1)

        def by_tokens(
            points: Sequence[Sequence[float]], per_step: float = per_step
        ) -> tuple[tuple[int, float], ...]:
            return tuple((round(step * per_step), value) for step, value in points)

        steps.append(
            HealingStep(
                tokens=report["tokens"],
                losses=by_tokens(report.get("losses") or ()),
                curve=by_tokens(report.get("valid_perplexities") or ()),
                divergences=by_tokens(report.get("valid_losses") or ()),
                source_perplexity=report.get("source_perplexity"),
                settings=settings,
            )
        )
        record = record.get("earlier")
    return tuple(reversed(steps))
