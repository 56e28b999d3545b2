"""How a student does on held-out text beside its teacher: everything from one pass over both.

Shape suffixes: N tokens, C tokens of one chunk, V vocabulary, D student's hidden size, E teacher's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpa_convert.forward.divergence import default_chunk_tokens
from tpa_convert.forward.head import Finish


@dataclass(frozen=True)
class Comparison:
    """Means over the predicted tokens, all but the first of each block.

    Attributes:
        kl: KL(teacher ‖ student) in nats per token.
        perplexity: of the student.
        source_perplexity: of the teacher.
        agreement: share of tokens at which both hold the same token for the likeliest, 0 to 1.
    """

    kl: float
    perplexity: float
    source_perplexity: float
    agreement: float

    @classmethod
    def from_sums(cls, sums: Tensor, tokens: int) -> Comparison:
        """From what `chunked_comparison` returned, added up, over so many tokens."""
        kl, student_nll, teacher_nll, same = (sums.double() / tokens).tolist()
        return cls(kl, _exp(student_nll), _exp(teacher_nll), same)


@torch.no_grad()
def chunked_comparison(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_VE: Tensor,
    targets_N: Tensor,
    student_finish: Finish | None = None,
    teacher_finish: Finish | None = None,
) -> Tensor:
    """Sums over tokens of [KL, student's and teacher's cross-entropy, agreement], fp32 [4].

    Logits exist for one chunk of tokens at a time, in the dtype of the hidden states.

    Args:
        student_hidden_ND, teacher_hidden_NE: final hidden states that predict the targets.
        student_weight_VD, teacher_weight_VE: output heads, of any floating dtype.
        targets_N: token ids.
        student_finish, teacher_finish: what the models make of products of their heads' weights, as
            `logit_finish` says.
    """
    student_weight = student_weight_VD.to(student_hidden_ND.dtype)
    teacher_weight = teacher_weight_VE.to(teacher_hidden_NE.dtype)
    step = default_chunk_tokens(len(student_weight), student_hidden_ND.dtype, compiled=False)
    sums = torch.zeros(4, device=student_hidden_ND.device)
    for start in range(0, len(targets_N), step):
        chunk = slice(start, start + step)
        student_CV = student_hidden_ND[chunk] @ student_weight.mT
        teacher_CV = teacher_hidden_NE[chunk] @ teacher_weight.mT
        student_CV = student_CV if student_finish is None else student_finish(student_CV)
        teacher_CV = teacher_CV if teacher_finish is None else teacher_finish(teacher_CV)
        same = student_CV.argmax(-1) == teacher_CV.argmax(-1)
        log_student = torch.log_softmax(student_CV, dim=-1, dtype=torch.float32)
        log_teacher = torch.log_softmax(teacher_CV, dim=-1, dtype=torch.float32)
        student_nll = F.nll_loss(log_student, targets_N[chunk], reduction="sum")
        teacher_nll = F.nll_loss(log_teacher, targets_N[chunk], reduction="sum")
        teacher = log_teacher.exp()
        kl = log_teacher.sub_(log_student).mul_(teacher).sum()
        sums += torch.stack([kl, student_nll, teacher_nll, same.sum()])
    return sums


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
