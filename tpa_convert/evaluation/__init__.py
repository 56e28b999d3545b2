"""Evaluation: what a converted model keeps of its source, and what it saves."""

from tpa_convert.evaluation.cache import CacheBytes, cache_bytes
from tpa_convert.evaluation.harness import TaskResult, run_tasks
from tpa_convert.evaluation.multiple_choice import (
    Accuracy,
    Drop,
    Question,
    load_questions,
    multiple_choice,
    paired_drop,
)
from tpa_convert.evaluation.perplexity import (
    Agreement,
    Perplexity,
    agreement,
    blocks_by_source,
    compare,
    geometric_mean,
    perplexity,
)
from tpa_convert.evaluation.report import EvaluationReport, Row
from tpa_convert.evaluation.run import evaluate
from tpa_convert.evaluation.speed import Speed, SpeedSettings, measure_speed

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
