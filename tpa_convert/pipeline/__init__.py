"""The steps of the command line as a Python API: plan, convert, heal, evaluate, bench, generate.

    from tpa_convert import pipeline
    from tpa_convert.recipe import ConvertOptions, HealOptions

    pipeline.convert("HuggingFaceTB/SmolLM2-135M", "small", ConvertOptions(kv_ratio=0.5))
    pipeline.heal("small", "healed", HealOptions(text=["essays.jsonl"]))

All of them in a row, from a recipe: `tpa_convert.pipeline.run`. Every function raises
`UserError` for what a user can put right, and writes whole outputs or none.
"""

from tpa_convert.pipeline.bench import bench
from tpa_convert.pipeline.conversion import ConversionResult, convert, preview
from tpa_convert.pipeline.evaluation import evaluate, generate
from tpa_convert.pipeline.healing import HealingResult, heal
from tpa_convert.pipeline.healing_needs import HealingPreview, preview_healing
from tpa_convert.pipeline.planning import PlanningResult, plan

__all__ = [
    "ConversionResult",
    "HealingPreview",
    "HealingResult",
    "PlanningResult",
    "bench",
    "convert",
    "evaluate",
    "generate",
    "heal",
    "plan",
    "preview",
    "preview_healing",
]
