"""Divergences between two language models, without their full-vocabulary logits in memory.

Shape suffixes: N tokens, C tokens of one chunk, V vocabulary, D student's hidden size, E teacher's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tpa_convert.forward.head import Finish

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(student logits [C, V], teacher logits [C, V]) -> sum over tokens (fp32 scalar), gradient of that
sum with respect to the student's logits [C, V]."""

CHUNK_BYTES = 640 * 2**20


def _log_softmax_shift(logits_CV: Tensor) -> Tensor:
    """What to subtract from logits for the logarithms of their softmax: [C, 1]."""
    largest = logits_CV.amax(-1, keepdim=True)
    return largest + (logits_CV - largest).exp_().sum(-1, keepdim=True).log_()


def forward_kl(
    student_logits_CV: Tensor, teacher_logits_CV: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """τ² KL(softmax(t/τ) ‖ softmax(s/τ)) in nats, summed over tokens, and its gradient.

    The factor τ² keeps the size of gradients independent of τ (Hinton et al., arXiv 1503.02531,
    section 2.1). With it, the gradient with respect to s is τ (softmax(s/τ) − softmax(t/τ)).
    The arithmetic is fp32; the gradient has the dtype of `student_logits_CV`.
    """
    return skewed_kl(student_logits_CV, teacher_logits_CV, 0.0, temperature)


def skewed_kl(
    student_logits_CV: Tensor,
    teacher_logits_CV: Tensor,
    skew: float = 0.1,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """τ² KL(t ‖ α t + (1 − α) s) in nats, summed over tokens, and its gradient, with t and s the
    distributions at temperature τ (DistiLLM, Ko et al., arXiv 2402.03898, eq. 4).

    Tokens of which the student thinks far too little do not run away with the loss. α = 0 is the
    forward KL. Arithmetic and dtypes are those of `forward_kl`.
    """
    s_CV, t_CV = (x.float() / temperature for x in (student_logits_CV, teacher_logits_CV))
    shift_s, shift_t = _log_softmax_shift(s_CV), _log_softmax_shift(t_CV)

    # Functions, so that a compiler computes them anew in each pass over the logits, where stored
    # they would be chunk times vocabulary numbers in fp32. Hence also the operations in place.
    def student() -> Tensor:
        return (s_CV - shift_s).exp_()

    def teacher() -> Tensor:
        return (t_CV - shift_t).exp_()

    def log_ratio() -> Tensor:
        return (s_CV - t_CV).sub_(shift_s - shift_t)

    if skew == 0.0:
        divergence = -log_ratio().mul_(teacher()).sum()
        gradient = student().sub_(teacher()).mul_(temperature)
        return divergence * temperature**2, gradient.to(student_logits_CV.dtype)

    def pull() -> Tensor:
        """t / (α t + (1 − α) s)"""
        # No more than e^80, because 0 · ∞ would be no number.
        ratio = log_ratio().clamp_max_(80.0).exp_()
        return ratio.mul_(1 - skew).add_(skew).reciprocal_()

    divergence = pull().log_().mul_(teacher()).sum()
    # Σ s pull, since s pull = (t − α t pull) / (1 − α).
    mean_pull = (1 - skew * teacher().mul_(pull()).sum(-1, keepdim=True)) / (1 - skew)
    gradient = pull().neg_().add_(mean_pull).mul_(student()).mul_((1 - skew) * temperature)
    return divergence * temperature**2, gradient.to(student_logits_CV.dtype)


def hidden_distance(student_BLD: Tensor, teacher_BLD: Tensor, variance_D: Tensor) -> Tensor:
    """Mean of (s − t)² / variance over tokens and channels, in fp32.

    Args:
        variance_D: the teacher's, of each channel over tokens. Dividing by it keeps the few
            channels with massive activations (Sun et al., arXiv 2402.17762) from being all that
            counts.

    Returns: fp32 scalar; zero for equal states, one for a student that knows only the means.
    """
    error_BLD = student_BLD.float() - teacher_BLD.float()
    return (error_BLD.square() / variance_D.clamp_min(torch.finfo(torch.float32).tiny)).mean()


def default_chunk_tokens(vocab_size: int, dtype: torch.dtype, compiled: bool) -> int:
    """The largest power of two of tokens whose logits and temporaries fit in CHUNK_BYTES."""
    # Two logits and a gradient; without compilation also five fp32 temporaries.
    bytes_per_logit = 3 * dtype.itemsize + (0 if compiled else 20)
    tokens = max(1, CHUNK_BYTES // (vocab_size * bytes_per_logit))
    return 1 << (tokens.bit_length() - 1)


def finished_divergence(
    student_product_CV: Tensor,
    teacher_product_CV: Tensor,
    divergence: Divergence,
    student_finish: Finish | None,
    teacher_finish: Finish | None,
) -> tuple[Tensor, Tensor]:
    """As `Divergence`, of what the models make of the products of their heads; the gradient is with
    respect to the student's product."""
    if teacher_finish is not None:
        teacher_product_CV = teacher_finish(teacher_product_CV)
    if student_finish is None:
        return divergence(student_product_CV, teacher_product_CV)
    with torch.enable_grad():
        product_CV = student_product_CV.detach().requires_grad_()
        logits_CV = student_finish(product_CV)
    value, grad_CV = divergence(logits_CV.detach(), teacher_product_CV)
    (grad_CV,) = torch.autograd.grad(logits_CV, product_CV, grad_CV)
    return value, grad_CV


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        student_hidden_ND: Tensor,
        student_weight_VD: Tensor,
        teacher_hidden_NE: Tensor,
        teacher_weight_VE: Tensor,
        divergence: Divergence,
        chunk_tokens: int,
        student_finish: Finish | None,
        teacher_finish: Finish | None,
    ) -> Tensor:
        # The gradients are known as soon as a chunk's logits are, so they are made here and the
        # backward pass only scales them; the logits of no chunk outlive it.
        hidden_needs_grad, weight_needs_grad, *_ = ctx.needs_input_grad
        weight_VD = student_weight_VD.to(student_hidden_ND.dtype)
        teacher_weight_VE = teacher_weight_VE.to(teacher_hidden_NE.dtype)
        grad_hidden = torch.empty_like(student_hidden_ND) if hidden_needs_grad else None
        grad_weight = (
            torch.zeros_like(student_weight_VD, dtype=torch.float32) if weight_needs_grad else None
        )
        total = torch.zeros((), dtype=torch.float32, device=student_hidden_ND.device)
        for start in range(0, len(student_hidden_ND), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            hidden_CD = student_hidden_ND[chunk]
            value, grad_CV = finished_divergence(
                hidden_CD @ weight_VD.mT,
                teacher_hidden_NE[chunk] @ teacher_weight_VE.mT,
                divergence,
                student_finish,
                teacher_finish,
            )
            total += value
            if grad_hidden is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight += grad_CV.mT @ hidden_CD
            del grad_CV  # before the next chunk's logits take their place
        tokens = len(student_hidden_ND)
        ctx.tokens, ctx.weight_dtype = tokens, student_weight_VD.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / tokens

    @staticmethod
    def backward(ctx, grad_output: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_output / ctx.tokens
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 6


def chunked_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: Divergence = forward_kl,
    chunk_tokens: int | None = None,
    student_finish: Finish | None = None,
    teacher_finish: Finish | None = None,
) -> Tensor:
    """Mean divergence per token between the logits `finish(hidden @ weight.T)` of two models.

    Logits exist for one chunk of tokens at a time, in the dtype of the hidden states; sums and the
    gradient of `student_weight` are fp32. Differentiable (once) with respect to the student.

    Args:
        student_hidden: final hidden states [..., D].
        student_weight: output head [V, D], of any floating dtype.
        teacher_hidden: [..., E], the same tokens.
        teacher_weight: [V, E].
        divergence: what to compute from a chunk's logits.
        chunk_tokens: tokens of a chunk; by default, what keeps the memory in use beyond the
            arguments and the gradients below 640 MiB. Half of it if a model has a finish, whose
            intermediate results take as much again.
        student_finish, teacher_finish: what the models make of products of their heads' weights, as
            `logit_finish` says.

    Returns: fp32 scalar.
    """
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(len(student_weight), student_hidden.dtype, False)
    if student_finish is not None or teacher_finish is not None:
        chunk_tokens = max(1, chunk_tokens // 2)
    if not torch.is_grad_enabled():  # needs_input_grad does not know of no_grad
        student_hidden, student_weight = student_hidden.detach(), student_weight.detach()
    return _ChunkedDivergence.apply(
        student_hidden.flatten(0, -2),
        student_weight,
        teacher_hidden.flatten(0, -2).detach(),
        teacher_weight.detach(),
        divergence,
        chunk_tokens,
        student_finish,
        teacher_finish,
    )
