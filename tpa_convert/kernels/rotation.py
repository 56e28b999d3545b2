"""Rotary position embedding in one launch, where a kernel runs it."""

from __future__ import annotations

from torch import Tensor

from .backends import Case, choose_backend
from .ops import launches


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor | None:
    """`x` with each of its pairs rotated, where a kernel runs it; None where none does.

    The arithmetic is fp32, and rounded once. Without gradients.

    Args:
        x: half-split features [b, j, s, 2 f], of which p and p + f are a pair; any strides.
        cosine, sine: of each feature, [b or 1, 1, s, 2 f]; sines of the first half are negative.

    Returns: [b, j, s, 2 f] in the type of `x`; in memory, positions come before heads.

    Raises:
        BackendError: the environment asks for a backend that cannot run this.
    """
    if choose_backend(Case("pairs", x.shape[-1], 0, x.dtype, x.device)) == "reference":
        return None
    x, cosine, sine = x.transpose(1, 2).contiguous(), cosine.contiguous(), sine.contiguous()
    return rotate_on_kernel(x, cosine, sine).transpose(1, 2)


def rotate_on_kernel(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The same of [b, s, j, 2 f], for those who know that a kernel runs it: positions are equally
    far apart, their heads side by side, and tables contiguous. No operator for compilers, which do
    without."""
    return launches(".launch_rotation").launch_rotation(x, cosine, sine)
