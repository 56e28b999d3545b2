"""How much of a GPU's arithmetic a healing run used."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from tpa_convert.healing import HealingReport
from tpa_convert.healing.training.distributed import processes
from tpa_convert.healing.training.flops import flops_per_token
from tpa_convert.healing.training.hardware import peak_flops


def mfu_of(
    student: PreTrainedModel, teacher: PreTrainedModel, report: HealingReport, length: int
) -> float:
    """Share of the GPUs' peak arithmetic that a run used; not a number where that is not known.

    Args:
        length: tokens of a sequence.
    """
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    peak = (peak or math.nan) * processes().num_processes
    return flops_per_token(student, teacher, length) * (report.tokens_per_second or 0) / peak
