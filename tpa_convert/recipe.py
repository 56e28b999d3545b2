"""The options of the Python API, under the name that the documentation uses.

    from tpa_convert import pipeline
    from tpa_convert.recipe import ConvertOptions

    pipeline.convert("HuggingFaceTB/SmolLM2-135M", "small", ConvertOptions(kv_ratio=0.5))

They are declared in `tpa_convert.options`.
"""

from tpa_convert.options.conversion import ConvertOptions
from tpa_convert.options.evaluation import EvaluateOptions, GenerateOptions
from tpa_convert.options.healing import HealOptions
from tpa_convert.options.planning import PlanOptions
from tpa_convert.options.recipe import Recipe, load_recipe
from tpa_convert.options.source import SourceOptions

__all__ = [
    "ConvertOptions",
    "EvaluateOptions",
    "GenerateOptions",
    "HealOptions",
    "PlanOptions",
    "Recipe",
    "SourceOptions",
    "load_recipe",
]
