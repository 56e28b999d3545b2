"""A converted model with a cache of plain numbers as one whose cache is coded in bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tpa_convert.calibration.cache_moments import collect_cache_moments
from tpa_convert.conversion.coded import choose_codes
from tpa_convert.conversion.model import convert_model
from tpa_convert.errors import UserError
from tpa_convert.export.dense import to_dense
from tpa_convert.families import family_of
from tpa_convert.options.conversion import ConvertOptions
from tpa_convert.pipeline.calibration import calibration_blocks
from tpa_convert.pipeline.prediction import predict
from tpa_convert.progress import Track, no_tracking
from tpa_convert.sources import Source, SourceReference


def coded_student(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    provenance: Mapping[str, Any],
    kv_ratio: float,
    track: Track = no_tracking,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with its cache coded, and its provenance.

    Its keys and values are those of a model of the source's class, with merged weights; that one is
    converted, calibrated on the text in the package.

    Args:
        student: in fp32, on the CPU.
        kv_ratio: share of the cache of the original source, at 16 bits a number.

    Raises:
        UserError: the cache is coded already, or the source's class cannot hold what the model
            computes.
    """
    if any(shape.coded for shape in student.config.layer_shapes):
        raise UserError("the cache of this model is coded in bits already: leave out `kv_ratio`")
    dense = to_dense(student)
    earlier = provenance["convert"]
    options = ConvertOptions(kv_ratio=kv_ratio, dtype=earlier["plan"]["dtype"])
    reference = SourceReference(**provenance["source"])
    source = Source(dense, tokenizer, family_of(dense.config), reference)
    prediction = predict(dense.config, options)
    blocks = calibration_blocks(source, options, track)
    moments = collect_cache_moments(source, blocks, seed=options.seed, track=track)
    plan = choose_codes(prediction.plan, moments.layers, moments.num_tokens).plan
    model = convert_model(source, plan, moments, track=track)
    prediction = replace(
        prediction, plan=plan, kv_bytes=round(plan.kv_bytes), parameters=model.num_parameters()
    )
    # Without a date of its own, so that a run that is continued begins with the same record.
    record = {
        **earlier,
        "settings": options.model_dump(mode="json"),
        "plan": prediction.to_json(),
        "earlier": {name: provenance[name] for name in ("convert", "heal") if name in provenance},
    }
    return model, {**provenance, "convert": record}
