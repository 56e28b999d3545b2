"""Convert a model and save it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tpa_convert.calibration.moments import Moments
from tpa_convert.conversion.coded import Codes, choose_codes
from tpa_convert.conversion.model import Conversion
from tpa_convert.conversion.shared_pairs import share_pairs
from tpa_convert.errors import UserError
from tpa_convert.export.output import Unfinished, atomic_file, check_output, resumable_directory
from tpa_convert.export.save import copy_licence, save_around_weights, stamp
from tpa_convert.export.shards import ShardedWeights
from tpa_convert.modeling import LayerShape
from tpa_convert.options.conversion import ConvertOptions
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline.calibration import (
    kept_moments,
    moments_of,
    samples,
    text_blocks,
    with_sampled,
)
from tpa_convert.pipeline.prediction import Prediction, predict
from tpa_convert.pipeline.selection import load, refuse_other_than_llama, source_options
from tpa_convert.plans import Plan
from tpa_convert.progress import Stages, Track, no_tracking
from tpa_convert.refinement.adaptation import Adaptation, AdaptedConversion
from tpa_convert.refinement.least_squares import REFIT
from tpa_convert.refinement.regression import RefinementSettings, refinement
from tpa_convert.sources import Source, device_of, read_source_config
from tpa_convert.storage import TensorFolder


@dataclass(frozen=True)
class ConversionResult:
    """What `convert` made.

    Attributes:
        out: directory of the converted model.
        prediction: plan, cache bytes and parameters, as `preview` returns them.
        seconds: wall time.
        stages: of it, by what was done.
        source_bytes: of the source's weights in their files.
        nats: what the codes of the cache are expected to cost a token, before refit and healing;
            None for a cache of plain numbers, and for a plan that has its codes already.
    """

    out: Path
    prediction: Prediction
    seconds: float
    stages: dict[str, float]
    source_bytes: int
    nats: float | None = None

    def to_json(self) -> dict[str, Any]:
        made = {
            "out": str(self.out),
            "seconds": self.seconds,
            "stages": self.stages,
            "source_bytes": self.source_bytes,
            "expected_nats": self.nats,
        }
        return made | self.prediction.to_json()


def preview(
    source: str | SourceOptions, options: ConvertOptions, *, with_needs: bool = False
) -> Prediction:
    """What a conversion would make: shapes, cache bytes, parameters. Reads no weights.

    Args:
        with_needs: whether to say too what memory, disk and time it takes on this machine.
    """
    where = source_options(source)
    config = read_source_config(
        where.model, revision=where.revision, trust_remote_code=where.trust_remote_code
    )
    return predict(
        config, options, trust_remote_code=where.trust_remote_code, with_needs=with_needs
    )


def convert(
    source: str | SourceOptions,
    out: str | Path,
    options: ConvertOptions,
    *,
    device: str = "auto",
    overwrite: bool = False,
    track: Track = no_tracking,
) -> ConversionResult:
    """Convert a model and save it to the directory `out`.

    Weights are read, converted and written one decoder layer at a time. A run that is cut short
    leaves a hidden directory beside `out`, from which the same call goes on.

    Args:
        source: Hub id, local directory or .gguf file, or options with a revision.
        options: budget, form, method, calibration.
        device: cpu, cuda, cuda:1, ... or auto.
        track: shows progress, called as `track(items, description)`.
    """
    start, stages = time.perf_counter(), Stages()
    out = check_output(out, overwrite)
    if options.save_moments is not None and options.save_moments.exists() and not overwrite:
        raise UserError(
            f"{options.save_moments} exists: use it with --moments, or pass --overwrite"
        )
    if options.target == "llama":
        refuse_other_than_llama(source)
    prediction = preview(source, options)  # a wrong budget is told before anything is loaded
    with stages("checking the source"):
        opened = load(source_options(source), device, on_demand=True)
    plan = prediction.plan
    reads_text = options.refit or options.refine
    moments = kept_moments(opened, options, coded=plan.is_coded)
    wants_moments = options.whiten or options.form == "linear" or plan.is_coded
    calibrated = reads_text or (wants_moments and moments is None)
    text = text_blocks(opened, options) if calibrated else None
    identity = _identity(opened, text, options)
    with resumable_directory(out, overwrite, identity) as made:
        blocks = text
        if text is not None and samples(opened, options):
            with stages("sampling text"):
                kept = made.work / "sampled.npy"
                blocks = with_sampled(opened, options, text, track, kept)
        nats: float | None = None
        by_layer: dict[str, Any] = {}  # how much the cache of each layer loses
        if wants_moments and moments is None:
            assert blocks is not None
            store, coded = TensorFolder(made.work / "moments"), plan.is_coded
            with stages("calibrating"):
                moments = moments_of(opened, blocks, options, track, coded=coded, store=store)
        if plan.coded is not None:
            assert moments is not None
            with stages("choosing codes"):
                codes = _codes(plan, moments, device_of(opened.model), made.work / "codes.json")
            plan, nats, by_layer["layer_nats"] = codes.plan, codes.nats, codes.layer_nats
        if options.target == "llama":
            assert moments is not None, "`whiten` is asked for"
            plan = share_pairs(plan, moments)
        parts: Conversion | AdaptedConversion
        parts = conversion = Conversion(
            opened,
            plan,
            moments,
            method=options.method,
            whiten=options.whiten,
            dtype=prediction.dtype,
        )
        if reads_text:
            assert blocks is not None
            store = TensorFolder(made.work / "adapted")
            parts = AdaptedConversion(conversion, _adaptation(options), blocks, store)
        model = _write_weights(parts, made, prediction, track, stages)
        if isinstance(parts, AdaptedConversion):
            by_layer["layer_errors"] = [astuple(error) for error in parts.errors]
        prediction = replace(
            prediction, plan=plan, kv_bytes=round(plan.kv_bytes), parameters=model.num_parameters()
        )
        record = {
            "settings": options.model_dump(mode="json"),
            "plan": prediction.to_json(),
            "sampled_blocks": 0 if text is None or blocks is None else len(blocks) - len(text),
            **by_layer,
            **stamp(),
        }
        provenance = {"source": asdict(opened.reference), "convert": record}
        save_around_weights(model, opened.tokenizer, made.output, out.name, provenance)
        if opened.weights is not None:
            copy_licence(opened.weights.checkpoint.directory, made.output)
    seconds = time.perf_counter() - start
    return ConversionResult(out, prediction, seconds, stages.seconds, opened.num_bytes, nats)


def _identity(source: Source, text: Tensor | None, options: ConvertOptions) -> dict[str, Any]:
    """All that a conversion follows from; what is sampled follows from it too."""
    digest = None if text is None else sha256(text.numpy().tobytes()).hexdigest()
    given = None
    if options.moments is not None and options.moments.is_file():
        given = options.moments.stat().st_mtime_ns
    return {
        "source": source.reference.sha256,
        "settings": options.model_dump(mode="json"),
        "text": digest,
        "moments": given,
        "device": str(device_of(source.model)),
        "versions": stamp()["versions"],
    }


def _codes(plan: Plan, moments: Moments, device: torch.device, path: Path) -> Codes:
    """The codes that an interrupted run has chosen, or else new ones."""
    if not path.is_file():
        chosen = choose_codes(plan, moments.layers, moments.num_tokens, device=device)
        record = {"layers": [asdict(x) for x in chosen.plan.layers], "nats": chosen.layer_nats}
        with atomic_file(path) as unfinished:
            unfinished.write_text(json.dumps(record), encoding="utf-8")
    record = json.loads(path.read_text(encoding="utf-8"))
    layers = [LayerShape(**values) for values in record["layers"]]
    return Codes(replace(plan, layers=layers, coded=None), tuple(record["nats"]))


def _write_shapes(path: Path, shapes: Sequence[LayerShape]) -> None:
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps([asdict(shape) for shape in shapes]), encoding="utf-8")


def _read_shapes(path: Path) -> list[LayerShape]:
    return [LayerShape(**values) for values in json.loads(path.read_text(encoding="utf-8"))]


def _write_weights(
    conversion: Conversion | AdaptedConversion,
    made: Unfinished,
    prediction: Prediction,
    track: Track,
    stages: Stages,
) -> PreTrainedModel:
    """Converts and writes part by part what is not there yet; the model without its weights."""
    num_bytes = prediction.parameters * prediction.dtype.itemsize
    weights = ShardedWeights(made.output, made.work / "weights", len(conversion), num_bytes)
    shapes: list[LayerShape] = []
    stage = conversion.description
    for index in track(range(len(conversion)), stage):
        decided = made.work / f"shape-{index:05}.json"
        if index not in weights:
            with stages(stage):
                part = conversion.part(index)
            _write_shapes(decided, [] if part.shape is None else [part.shape])
            with stages("writing"):
                weights[index] = part.tensors
            del part
        shapes += _read_shapes(decided)
    model = conversion.empty_model(shapes)
    with stages("writing"):
        written = weights.finish()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert written == {n: s for n, s in expected.items() if n not in conversion.tied}
    return model


def _adaptation(options: ConvertOptions) -> Adaptation:
    """A refit or a refinement, as is asked for."""
    if options.refit:
        return REFIT
    return refinement(RefinementSettings(steps=options.refine_steps, seed=options.seed))
