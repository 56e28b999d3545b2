"""The model card: where the model comes from, what it caches, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from tpa_convert.evaluation import EvaluationReport

TEMPLATE = Path(__file__).with_name("card_template.md")
FILES = ("calibration", "moments", "save_moments", "plan", "text", "valid_text")
"""Settings that may hold paths of the machine the model was made on."""


def render_card(name: str, provenance: Mapping[str, Any]) -> str:
    """Markdown of the card of the model called `name`.

    The licence is left to the source: a converted model is a derivative of it, and only a person
    can say what its terms allow. Of local files only the names are given: their paths are of no use
    to others, and `base_model` in the metadata would have to be a Hub id.
    """
    source = provenance["source"]
    local = is_local(source["id"])
    name_of_source = without_folders(source["id"])
    data = ModelCardData(
        base_model=None if local else source["id"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tpa", "tensor-product-attention", "kv-cache"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        source=name_of_source,
        plan=provenance["convert"]["plan"],
        healed=provenance.get("heal"),
        healed_on=sum(report["tokens"] for report in _healings(provenance)),
        results=_results(provenance),
        making=making(provenance),
        quality=quality(provenance, name),
        recipe=recipe_of(provenance),
        versions=provenance["convert"]["versions"],
    )
    return str(card)


def recipe_of(provenance: Mapping[str, Any]) -> str:
    """How a model was made, in YAML, without the folders of the machine it was made on."""
    sections = {
        section: {
            key: without_folders(value) if key in FILES else value
            for key, value in provenance[section]["settings"].items()
            if value not in (None, [])
        }
        for section in ("convert", "heal")
        if section in provenance
    }
    source = provenance["source"]
    values = {"source": {**source, "id": without_folders(source["id"])}, **sections}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()


def making(provenance: Mapping[str, Any]) -> list[str]:
    """What it was calibrated and healed on, and with which loss: a sentence each."""
    chosen = provenance["convert"]["settings"]
    sentences = []
    if chosen.get("whiten", True) and "calibration_blocks" in chosen:
        texts = chosen.get("calibration") or ["the short text that comes with tpa-convert"]
        sampled = provenance["convert"].get("sampled_blocks")
        among = f", {sampled} of them sampled from the source" if sampled else ""
        calibrated = (
            f"on {', '.join(without_folders(texts))}, {chosen['calibration_blocks']} sequences of "
            f"{chosen['block_length']} tokens{among}"
        )
        if chosen.get("moments"):  # whose text is not told by these settings
            moments = without_folders(chosen["moments"])
            calibrated = f"by moments that were measured before ({moments})"
        sentences.append(f"Calibrated {calibrated}.")
    if "heal" in provenance:
        settings = provenance["heal"]["settings"]
        texts = without_folders(list(settings.get("text") or []))
        sampled = "text sampled from the source" if settings.get("sampled_tokens") else None
        chats = "chats sampled from the source" if settings.get("sampled_chat_tokens") else None
        weight = provenance["heal"].get("hidden_weight", settings.get("hidden_weight"))
        sentences.append(
            f"Healed on {', '.join(filter(None, [*texts, sampled, chats]))}; the loss is the "
            f"divergence from the source's predictions (skew {settings.get('skew', 0):g}, "
            f"temperature {settings.get('temperature', 1):g}) and the distance of hidden states "
            f"(weight {'by default' if weight is None else f'{weight:g}'})."
        )
    return sentences


def quality(
    provenance: Mapping[str, Any], name: str, measured: EvaluationReport | None = None
) -> list[str]:
    """How good the model is as far as it was measured: a sentence each.

    Args:
        name: of the model's directory.
        measured: results that are newer than those of its record.
    """
    if measured is None and "evaluate" in provenance:
        measured = EvaluationReport.from_json(provenance["evaluate"]["report"])
    if measured is not None:
        column = own_column(measured, provenance, name)
        if column is not None and (sentences := _evaluated_quality(measured, column)):
            return sentences
    for report in _healings(provenance):
        source, curve = report.get("source_perplexity"), report.get("valid_perplexities")
        if source and curve:
            found = curve[-1][1]
            return [
                f"On held-out text its perplexity is {found:.2f}, the source's {source:.2f} "
                f"(×{found / source:.3f})."
            ]
    return ["It has not been measured on any text yet."]


def own_column(report: EvaluationReport, provenance: Mapping[str, Any], name: str) -> str | None:
    """The column of an evaluation that is about this model; None if that cannot be told.

    Columns are called by what was done or, where that does not tell models apart, by the ends of
    their paths.
    """
    others = report.models[1:]
    kind = "healed" if "heal" in provenance else "converted"
    for column in others:
        if column == kind or Path(column).name == name:
            return column
    return others[0] if len(others) == 1 else None


def _evaluated_quality(report: EvaluationReport, model: str) -> list[str]:
    """Perplexities, and what is answered worse."""
    sentences = []
    for row in report.rows:
        ratio, value = row.ratio(model), row.values[model]
        if row.unit == "perplexity" and ratio is not None and value is not None:
            source = row.values[report.models[0]]
            sentences.append(
                f"Perplexity on {row.name}: {value:.2f}, the source's {source:.2f} (×{ratio:.3f})."
            )
        elif model in row.margins and value is not None:
            sentences.append(f"{row.name}: {value:.2f} ± {row.margins[model]:.2f} points.")
    return sentences


def _healings(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The reports of all healings, the last one first."""
    record = provenance.get("heal")
    while record is not None:
        yield record["report"]
        record = record.get("earlier")


def _results(provenance: Mapping[str, Any]) -> str | None:
    if "evaluate" not in provenance:
        return None
    return EvaluationReport.from_json(provenance["evaluate"]["report"]).to_markdown()


def without_folders(spec: Any) -> Any:
    """Of paths only the names; Hub ids as they are. A list is treated entry by entry."""
    if isinstance(spec, list):
        return [without_folders(entry) for entry in spec]
    return Path(spec).name if is_local(spec) else spec


def is_local(spec: str) -> bool:
    """Hub ids are `name` or `owner/name`; anything else, or anything on this disk, is a path."""
    return (
        spec.startswith((".", "/", "~"))
        or spec.count("/") > 1
        or spec.endswith(".gguf")
        or "*" in spec
        or Path(spec).exists()
    )
