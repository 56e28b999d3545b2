"""The tables of families in the README: `python -m tests.family_table` writes them anew.

What is special about a family is read off a tiny model of it and its conversion. Every family is
checked in the same ways, so that the checks are a table of their own: which families a check runs
on is asked of pytest (`test_adding_a_family`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conversions import convert_tiny
from tests.tiny_models import BUILT_LIKE, MODELS
from tpa_convert.families import FAMILIES, Family, experts_of, family_of
from tpa_convert.forward.walk import attention_modules
from tpa_convert.sources.attention import rotated_dims

CHECKS = {
    "test_full_width_is_the_source": (
        "at full width, rotated, latent and contextual: the source's logits to 1e-4 in fp32",
        "scores scaled by 1.1",
    ),
    "test_every_step_has_the_logits_of_a_full_pass": (
        "step by step with dynamic, static and sliding caches: the logits of one pass to 1e-4",
        "layers that miss the cache",
    ),
    "test_left_padding_changes_nothing": ("left padding: to 1e-4", "padding that is attended to"),
    "test_what_is_predicted_is_cached": (
        "bytes and parameters: what was predicted, in the live cache",
        "the source's own cache, which holds twice as much",
    ),
    "test_a_quarter_of_the_bytes": (
        "coded at a quarter of the bytes: within the budget, near the source, step by step as in "
        "one pass",
        "another model; a step without what was cached",
    ),
    "test_exports_load_without_the_package": (
        "exports without the package: the same logits",
        "another export",
    ),
    "test_calibration_pays": ("calibrated: nearer to the source", "by the weights alone"),
    "test_refit_and_refinement_lower_the_loss": (
        "refit and refinement: nearer to the source",
        "refined towards another model",
    ),
    "test_healing_lowers_the_loss": ("healing: nearer to the source", "another teacher"),
}
"""By the name of a test: what it checks, and what it fails on."""

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- families: from tests/family_table.py -->\n", "<!-- end of families -->"
TRAINED = (
    "test_calibration_pays",
    "test_refit_and_refinement_lower_the_loss",
    "test_healing_lowers_the_loss",
)


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
        "experts": experts_of(config) > 0,
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


def checks() -> str:
    """Markdown, a row for each of `CHECKS`."""
    trained = len(MODELS) - len(BUILT_LIKE)
    rows = ["| check | negative control | families |", "|---|---|---|"]
    for name, (what, control) in CHECKS.items():
        count = trained if name in TRAINED else len(MODELS)
        rows.append(f"| {what} | {control} | {count} of {len(MODELS)} |")
    return "\n".join(rows) + "\n"


def tables() -> str:
    """All that stands between the marks in the README."""
    return f"{table()}\n{checks()}"


def parts(text: str) -> tuple[str, str, str]:
    """A README's text before, in and after the tables."""
    before, _, rest = text.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, inside, after


if __name__ == "__main__":
    before, _, after = parts(README.read_text(encoding="utf-8"))
    README.write_text(before + BEGIN + tables() + END + after, encoding="utf-8")
