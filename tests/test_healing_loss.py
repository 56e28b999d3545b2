"""The fused loss and the steps of the trainer against plain autograd."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import make_tiny_llama
from tests.healing import plain_kl
from tpa_convert.forward.divergence import default_chunk_tokens
from tpa_convert.healing import (
    HealingSettings,
    chunked_divergence,
    heal,
    parameter_groups,
    skewed_kl,
)
from tpa_convert.healing.training import preparation


@given(
    tokens=st.integers(1, 9),
    chunk_tokens=st.integers(1, 10),
    vocab=st.integers(2, 17),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    skew=st.sampled_from([0.0, 0.1, 0.7]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_chunked_divergence_is_the_mean_kl_with_its_gradients(
    tokens: int,
    chunk_tokens: int,
    vocab: int,
    widths: tuple[int, int],
    temperature: float,
    skew: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student_hidden, student_weight = random(tokens, widths[0]), random(vocab, widths[0])
    teacher_hidden, teacher_weight = random(tokens, widths[1]), random(vocab, widths[1])
    inputs = [student_hidden.requires_grad_(), student_weight.requires_grad_()]
    expected = plain_kl(
        student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T, temperature, skew
    )
    expected_gradients = torch.autograd.grad(3.0 * expected, inputs)

    fused = [x.detach().float().requires_grad_() for x in inputs]
    loss = chunked_divergence(
        *fused,
        teacher_hidden.float(),
        teacher_weight.float(),
        divergence=partial(skewed_kl, skew=skew, temperature=temperature),
        chunk_tokens=chunk_tokens,
    )
    gradients = torch.autograd.grad(3.0 * loss, fused)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)


def test_frozen_head_and_validation_get_no_weight_gradient() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(7, 4)
    loss = chunked_divergence(hidden, weight, torch.randn(3, 4), torch.randn(7, 4))
    loss.backward()
    assert weight.grad is None
    assert hidden.grad is not None
    with torch.no_grad():
        loss = chunked_divergence(
            hidden, weight.requires_grad_(), torch.randn(3, 4), torch.randn(7, 4)
        )
    assert not loss.requires_grad


def test_chunks_shrink_with_the_vocabulary() -> None:
    assert default_chunk_tokens(49152, torch.bfloat16, compiled=True) == 2048
    assert default_chunk_tokens(49152, torch.bfloat16, compiled=False) == 512
    assert default_chunk_tokens(10**10, torch.float32, compiled=False) == 1


def layer_outputs(model: Any, blocks: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the hidden states after each layer."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, arguments, output: states.append(output))
        for layer in model.model.layers
    ]
    logits = model(blocks).logits
    for hook in hooks:
        hook.remove()
    return logits, states


@pytest.mark.parametrize(("tied", "hidden_weight"), [(False, 0.0), (True, 0.0), (False, 0.7)])
def test_loss_of_the_trainer_equals_plain_distillation(
    tied: bool, hidden_weight: float, random_tokens: Any, tmp_path: Path
) -> None:
    """Two steps of heal() move every parameter as AdamW does on plainly computed gradients."""
    teacher = make_tiny_llama("gqa", seed=1, tie_word_embeddings=tied)
    student = make_tiny_llama("mqa", seed=2, tie_word_embeddings=tied)
    blocks = random_tokens(8, 16)
    reference = copy.deepcopy(student).requires_grad_(True)

    rates = {"attention_learning_rate": 1e-2, "learning_rate": 3e-3}
    groups = parameter_groups(reference, **rates, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, betas=preparation.ADAM_BETAS)
    targets, target_states = layer_outputs(teacher, blocks)
    # Of two steps, half a cosine (the rates) and a line (the weight) leave the same.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 2)
    divergences = []
    for left in (1.0, 0.5):
        logits, states = layer_outputs(reference, blocks)
        divergence = loss = plain_kl(logits, targets, 2.0, HealingSettings().skew)
        for state, target in zip(states, target_states, strict=True):
            missed = (state - target).square().mean((0, 1)) / target.var((0, 1), correction=0)
            loss = loss + left * hidden_weight * missed.mean() / len(states)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        divergences.append(divergence.item())

    two_steps = HealingSettings(
        tokens=256,
        tokens_per_step=128,
        batch_size=2,  # so that gradients are accumulated over four batches
        **rates,
        weight_decay=0.1,
        temperature=2.0,
        hidden_weight=hidden_weight,
    )
    report = heal(
        student, teacher, None, blocks, settings=two_steps, output_dir=tmp_path, progress=False
    )
    assert [loss for _, loss in report.losses] == pytest.approx(divergences, rel=1e-4)
    assert report.batch_size == 2
    healed = dict(student.named_parameters())
    for name, parameter in reference.named_parameters():
        # Adam's first step is a sign: where a gradient is nearly 0, rounding decides.
        torch.testing.assert_close(healed[name], parameter, rtol=1e-3, atol=1e-4)
