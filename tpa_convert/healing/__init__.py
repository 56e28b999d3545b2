"""Distillation of a converted model from its source."""

from tpa_convert.forward.divergence import chunked_divergence, forward_kl, skewed_kl
from tpa_convert.healing.training.run import HealingInterrupted, HealingReport, heal
from tpa_convert.healing.training.trainer import DistillationTrainer, parameter_groups
from tpa_convert.options.healing import HealingSettings

__all__ = [
    "DistillationTrainer",
    "HealingInterrupted",
    "HealingReport",
    "HealingSettings",
    "chunked_divergence",
    "forward_kl",
    "heal",
    "parameter_groups",
    "skewed_kl",
]
