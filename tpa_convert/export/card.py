"""The model card: where the model comes from, what it caches, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from tpa_convert.evaluation import EvaluationReport

TEMPLATE = Path(__file__).with_name("card_template.md")


def render_card(name: str, provenance: Mapping[str, Any]) -> str:
    """Markdown of the card of the model called `name`.

    The licence is left to the source: a converted model is a derivative of it, and only a person
    can say what its terms allow. Of a local source only the name is given: its path is of no use to
    others, and `base_model` in the metadata would have to be a Hub id.
    """
    source = provenance["source"]
    local = _is_local(source["id"])
    data = ModelCardData(
        base_model=None if local else source["id"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tpa", "tensor-product-attention", "kv-cache"],
    )
    sections = {
        section: {k: v for k, v in provenance[section]["settings"].items() if v not in (None, [])}
        for section in ("convert", "heal")
        if section in provenance
    }
    name_of_source = Path(source["id"]).name if local else source["id"]
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
        results=_results(provenance),
        recipe=recipe.strip(),
        versions=provenance["convert"]["versions"],
    )
    return str(card)


def _results(provenance: Mapping[str, Any]) -> str | None:
    if "evaluate" not in provenance:
        return None
    return EvaluationReport.from_json(provenance["evaluate"]["report"]).to_markdown()


def _is_local(source_id: str) -> bool:
    """Hub ids are `name` or `owner/name`; anything else, or anything on this disk, is a path."""
    return (
        source_id.startswith((".", "/", "~"))
        or source_id.count("/") > 1
        or source_id.endswith(".gguf")
        or Path(source_id).exists()
    )
