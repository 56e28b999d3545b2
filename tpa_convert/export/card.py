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
    data = ModelCardData(
        base_model=None if local else source["id"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tpa", "tensor-product-attention", "kv-cache"],
    )
    sections = {
        section: {
            key: _without_folders(value) if key in FILES else value
            for key, value in provenance[section]["settings"].items()
            if value not in (None, [])
        }
        for section in ("convert", "heal")
        if section in provenance
    }
    name_of_source = _without_folders(source["id"])
    recipe = yaml.safe_dump(
        {"source": {**source, "id": name_of_source}, **sections},
        sort_keys=False,
        allow_unicode=True,
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
        recipe=recipe.strip(),
        versions=provenance["convert"]["versions"],
    )
    return str(card)


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


def _without_folders(spec: Any) -> Any:
    """Of paths only the names; Hub ids as they are. A list is treated entry by entry."""
    if isinstance(spec, list):
        return [_without_folders(entry) for entry in spec]
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
