"""Convert a model and save it."""

from __future__ import annotations

import time
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tpa_convert.conversion.coded import choose_codes
from tpa_convert.conversion.model import convert_model
from tpa_convert.conversion.shared_pairs import share_pairs
from tpa_convert.errors import UserError
from tpa_convert.export.output import atomic_directory, check_output
from tpa_convert.export.save import save_converted, stamp
from tpa_convert.options.conversion import ConvertOptions
from tpa_convert.options.source import SourceOptions
from tpa_convert.pipeline.calibration import calibration_blocks, moments_of
from tpa_convert.pipeline.prediction import Prediction, predict
from tpa_convert.pipeline.selection import load, refuse_other_than_llama, source_options
from tpa_convert.progress import Track, no_tracking
from tpa_convert.refinement.least_squares import refit
from tpa_convert.refinement.regression import RefinementSettings, refine
from tpa_convert.sources import read_source_config


@dataclass(frozen=True)
class ConversionResult:
    """What `convert` made.

    Attributes:
        out: directory of the converted model.
        prediction: plan, cache bytes and parameters, as `preview` returns them.
        seconds: wall time.
        nats: what the codes of the cache are expected to cost a token, before refit and healing;
            None for a cache of plain numbers, and for a plan that has its codes already.
    """

    out: Path
    prediction: Prediction
    seconds: float
    nats: float | None = None

    def to_json(self) -> dict[str, Any]:
        made = {"out": str(self.out), "seconds": self.seconds, "expected_nats": self.nats}
        return made | self.prediction.to_json()


def preview(source: str | SourceOptions, options: ConvertOptions) -> Prediction:
    """What a conversion would make: shapes, cache bytes, parameters. Reads no weights."""
    where = source_options(source)
    config = read_source_config(
        where.model, revision=where.revision, trust_remote_code=where.trust_remote_code
    )
    return predict(config, options, trust_remote_code=where.trust_remote_code)


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

    Args:
        source: Hub id, local directory or .gguf file, or options with a revision.
        options: budget, form, method, calibration.
        device: cpu, cuda, cuda:1, ... or auto.
        track: shows progress, called as `track(items, description)`.
    """
    start = time.perf_counter()
    out = check_output(out, overwrite)
    if options.save_moments is not None and options.save_moments.exists() and not overwrite:
        raise UserError(
            f"{options.save_moments} exists: use it with --moments, or pass --overwrite"
        )
    if options.target == "llama":
        refuse_other_than_llama(source)
    prediction = preview(source, options)  # a wrong budget is told before anything is loaded
    loaded = load(source_options(source), device)
    with atomic_directory(out, overwrite) as directory:
        reads_text = options.refit or options.refine
        given = options.moments is not None
        plan = prediction.plan
        needs_moments = options.whiten or options.form == "linear" or given or plan.is_coded
        calibrated = reads_text or (needs_moments and not given)
        blocks = calibration_blocks(loaded, options) if calibrated else None
        moments = None
        nats: float | None = None
        by_layer: dict[str, Any] = {}  # how much the cache of each layer loses
        if needs_moments:
            moments = moments_of(loaded, blocks, options, track, coded=plan.is_coded)
        if plan.coded is not None:
            assert moments is not None
            codes = choose_codes(plan, moments.layers, moments.num_tokens)
            plan, nats, by_layer["layer_nats"] = codes.plan, codes.nats, codes.layer_nats
        if options.target == "llama":
            assert moments is not None, "`whiten` is asked for"
            plan = share_pairs(plan, moments)
        model = convert_model(
            loaded,
            plan,
            moments,
            method=options.method,
            whiten=options.whiten,
            dtype=torch.float32 if reads_text else prediction.dtype,
            track=track,
        )
        if options.refit:
            assert blocks is not None
            model = model.to(loaded.model.device)
            errors = refit(loaded.model, model, blocks, track=track)
            by_layer["layer_errors"] = [astuple(error) for error in errors]
        if options.refine:
            assert blocks is not None
            settings = RefinementSettings(steps=options.refine_steps, seed=options.seed)
            model = model.to(loaded.model.device)
            errors = refine(loaded.model, model, blocks, settings, track=track)
            by_layer["layer_errors"] = [astuple(error) for error in errors]
        model = model.to(prediction.dtype)
        prediction = replace(
            prediction, plan=plan, kv_bytes=round(plan.kv_bytes), parameters=model.num_parameters()
        )
        record = {
            "settings": options.model_dump(mode="json"),
            "plan": prediction.to_json(),
            **by_layer,
            **stamp(),
        }
        provenance = {"source": asdict(loaded.reference), "convert": record}
        save_converted(model, loaded.tokenizer, directory, out.name, provenance)
    return ConversionResult(out, prediction, time.perf_counter() - start, nats)
