"""The table of families in the README: `python -m tests.family_table` writes it anew.

What is special about a family is read off a tiny model of it and its conversion. That all of them
pass the checks of `test_families` is said above the table, and is so: that test goes through the
same list.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conversions import convert_tiny
from tests.tiny_models import MODELS
from tpa_convert.families import FAMILIES, Family, family_of
from tpa_convert.forward.walk import attention_modules
from tpa_convert.sources.attention import rotated_dims

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- families: from tests/family_table.py -->\n", "<!-- end of families -->"
EXPERTS = ("num_experts", "num_local_experts")


def special(family: Family, model: Any) -> str:
    """In a few words, what its attention does that Llama's does not."""
    config, names = model.config, family.names
    layers: list[Any] = attention_modules(convert_tiny(model))
    rotated = [layer.table_order is not None for layer in layers]
    partly = any(
        rotated_dims(config, layer.head_dim, i) < layer.head_dim for i, layer in enumerate(layers)
    )
    windows = [layer.sliding_window is not None for layer in layers]
    found = {
        "experts": any(getattr(config, name, None) for name in EXPERTS),
        "sliding windows": any(windows),
        "QK-norm": family.key_norm is True,
        "QK-norm over all heads": family.key_norm == "all",
        "partial rotation": partly and any(rotated),
        "neighbouring features rotated": names.pairs == "neighbours",
        "layers without rotation": not all(rotated),
        "soft caps": any(layer.softcap is not None for layer in layers),
        "stacked projections": names.fused is not None,
        "biases": any(layer.q_proj.bias is not None for layer in layers),
    }
    return ", ".join(name for name, there in found.items() if there)


def table() -> str:
    """Markdown, a row for each family in the order of `FAMILIES`."""
    models = {model.config.model_type: model for model in (make() for make in MODELS.values())}
    rows = ["| family | `model_type` | beside what Llama has |", "|---|---|---|"]
    for family in FAMILIES:
        what = special(family, models[family.model_type])
        rows.append(f"| {family.title} | `{family.model_type}` | {what} |")
        assert family_of(models[family.model_type].config) is family
    return "\n".join(rows) + "\n"


def parts(text: str) -> tuple[str, str, str]:
    """A README's text before, in and after the table."""
    before, _, rest = text.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside, after


if __name__ == "__main__":
    before, _, after = parts(README.read_text(encoding="utf-8"))
    README.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
