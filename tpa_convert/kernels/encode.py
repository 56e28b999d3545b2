"""Components to codes in one launch, and the same with gradients for training.

As operators of PyTorch they would cost the host twice as much: only compilers are given those.

Components, tables and codes are those of `encode_reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .backends import Case, choose_backend
from .encode_reference import CodeTables, RowCodes, RowTables, encode_components, pack, row_codes
from .rows import in_whole_words


def encode(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor]:
    """Headers uint8 [...] and codes uint8 [..., c] of components [..., c]; without gradients."""
    flat = x.detach().reshape(-1, x.shape[-1])
    if _on_kernel(x):
        compiling = torch.compiler.is_compiling()
        header, codes = ops.encode(flat, *tables) if compiling else ops.run_encode(flat, tables)
    else:
        header, codes, *_ = encode_components(flat, tables)
    return header.view(x.shape[:-1]), codes.view(x.shape)


def encode_rows(x: Tensor, tables: CodeTables, rows: RowTables) -> tuple[Tensor, Tensor]:
    """Rows of bytes, uint8 [..., n], of components [..., c], and what they say, [...,
    `whole_words(c + 1)`]: what `straight_through` gives, behind it the class as a number, and
    zeros; without gradients."""
    flat = x.detach().reshape(-1, x.shape[-1])
    if _on_kernel(x):
        packed, said = rows_on_kernel(flat, row_codes(tables, rows))
    else:
        header, codes, scaled, _, label = encode_components(flat, tables)
        packed = pack(codes, header, rows)
        said = in_whole_words(torch.cat((scaled, label[:, None].to(x.dtype)), 1))
    leading = x.shape[:-1]
    return packed.view(*leading, packed.shape[-1]), said.view(*leading, said.shape[-1])


def rows_on_kernel(x: Tensor, codes: RowCodes) -> tuple[Tensor, Tensor]:
    """`encode_rows` of [n, c], for those who know that a kernel runs it."""
    compiling = torch.compiler.is_compiling()
    return ops.encode_rows(x, *codes) if compiling else ops.run_rows(x, codes)


def straight_through(x: Tensor, tables: CodeTables) -> tuple[Tensor, Tensor]:
    """What attention reads of coded components [..., c], with gradients for learning.

    Rounding has the gradient of the identity: components pass theirs on unless they are clipped,
    and steps and means get those of learned step size quantisation (arXiv 1902.08153) if they ask
    for any. Class and scale are constants to it.

    Returns: scale · step · (code − reach) [..., c] in the type of `x`, to which the mean of the
        class is not added, and classes int64 [...].
    """
    flat = x.reshape(-1, x.shape[-1])
    scaled, label = _StraightThrough.apply(flat, *tables)
    return scaled.view(x.shape), label.view(x.shape[:-1])


def runs_components(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel codes so many components of this type and place.

    Raises:
        BackendError: the environment asks for a backend that cannot.
    """
    return choose_backend(Case("components", width, 0, dtype, device)) != "reference"


def _on_kernel(x: Tensor) -> bool:
    return runs_components(x.shape[-1], x.dtype, x.device)


class _StraightThrough(torch.autograd.Function):
    """Of rows [n, c]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tables: Any) -> tuple[Tensor, Tensor]:
        named = CodeTables(*tables)
        if _on_kernel(x):
            if torch.compiler.is_compiling():
                scaled, inside, label = ops.encode_straight(x, *tables)
            else:
                scaled, inside, label = ops.run_straight(x, named)
        else:
            _, _, scaled, inside, label = encode_components(x, named)
        ctx.mark_non_differentiable(label)
        learned = (x, named.step, named.mean, scaled) if any(ctx.needs_input_grad[1:]) else ()
        ctx.save_for_backward(inside, label, *learned)
        return scaled, label

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        inside, label, *learned = ctx.saved_tensors
        passed = gradient * inside
        of_mean = of_step = None
        if learned:
            x, step, mean, scaled = learned
            of_mean = torch.zeros_like(mean).index_add(0, label, -passed.to(mean.dtype))
            error = scaled - inside * (x - mean[label])
            of_step = (gradient * error).sum(0) / step
        return (passed if ctx.needs_input_grad[0] else None, of_mean, of_step, *[None] * 4)
