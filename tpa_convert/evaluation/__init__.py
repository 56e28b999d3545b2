"""Evaluation: what a converted model keeps of its source, and what it saves."""

from tpa_convert.evaluation.metrics.cache import CacheBytes, cache_bytes
from tpa_convert.evaluation.metrics.harness import TaskResult, run_tasks
from tpa_convert.evaluation.metrics.multiple_choice import (
    Accuracy,
    Drop,
    Question,
    load_questions,
    multiple_choice,
    paired_drop,
)
from tpa_convert.evaluation.metrics.speed import Speed, SpeedSettings, measure_speed
from tpa_convert.evaluation.report import EvaluationReport, Row
from tpa_convert.evaluation.run import evaluate
from tpa_convert.evaluation.texts import blocks_by_source
from tpa_convert.forward.comparison import (
    Agreement,
    Perplexity,
    agreement,
    compare,
    geometric_mean,
    perplexity,
)

__all__ = [
    "Accuracy",
    "Agreement",
    "CacheBytes",
    "Drop",
    "EvaluationReport",
    "Perplexity",
    "Question",
    "Row",
    "Speed",
    "SpeedSettings",
    "TaskResult",
    "agreement",
    "blocks_by_source",
    "cache_bytes",
    "compare",
    "evaluate",
    "geometric_mean",
    "load_questions",
    "measure_speed",
    "multiple_choice",
    "paired_drop",
    "perplexity",
    "run_tasks",
]
