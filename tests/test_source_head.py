"""Distillation through the models' own heads: what they do to logits is in loss and gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conversions import random_blocks
from tests.tiny_models import MODELS
from tpa_convert.forward.comparison import compare
from tpa_convert.forward.head import (
    decoder_output,
    final_hidden_states,
    logit_finish,
    with_head_input,
)
from tpa_convert.forward.stand_in import arguments_at
from tpa_convert.healing import HealingSettings, chunked_divergence, heal
from tpa_convert.healing.loss.comparison import Comparison, chunked_comparison
from tpa_convert.healing.training.distributed import outline

BLOCKS = random_blocks(count=4, length=16, seed=3)
FINISHED = ["gemma3", "granite", "cohere"]  # a soft cap, a divisor, a factor
PLAIN = ["llama", "qwen3"]


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = (F.log_softmax(logits.double(), -1) for logits in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("outlined", [False, True])
@pytest.mark.parametrize("family", [*FINISHED, "phi", *PLAIN])  # phi has a bias
def test_the_finish_is_what_the_model_does(family, outlined) -> None:
    model = MODELS[family]()
    output = decoder_output(model)
    finish = logit_finish(outline(model), output) if outlined else logit_finish(model)
    assert (finish is None) == (family in PLAIN)
    product = F.linear(final_hidden_states(model, BLOCKS), model.lm_head.weight)
    logits = product if finish is None else finish(product)
    assert torch.equal(logits, model(BLOCKS).logits)
    if finish is not None:
        assert finish(product.bfloat16()).dtype == torch.bfloat16
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("pair", [("gemma3", "granite"), ("cohere", "llama"), ("llama", "gemma3")])
@pytest.mark.parametrize("chunk_tokens", [7, 1000])
def test_the_divergence_is_that_of_whole_logits(pair, chunk_tokens) -> None:
    student, teacher = MODELS[pair[0]](seed=1), MODELS[pair[1]](seed=2)
    student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.clone())
    features = final_hidden_states(student, BLOCKS).requires_grad_()
    inputs = [features, student.lm_head.weight]
    finishes = [logit_finish(model) for model in (student, teacher)]

    def finished(model: Any, product: Tensor) -> Tensor:
        finish = finishes[0] if model is student else finishes[1]
        return product if finish is None else finish(product)

    expected = plain_kl(
        finished(student, F.linear(features, student.lm_head.weight)), teacher(BLOCKS).logits
    )
    expected_gradients = torch.autograd.grad(2 * expected, inputs)

    def found(**options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = chunked_divergence(
            *inputs,
            final_hidden_states(teacher, BLOCKS),
            teacher.lm_head.weight,
            chunk_tokens=chunk_tokens,
            **options,
        )
        return loss, torch.autograd.grad(2 * loss, inputs)

    loss, gradients = found(student_finish=finishes[0], teacher_finish=finishes[1])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-7)
    # The products of the heads alone, as before, are another loss.
    loss, gradients = found()
    assert abs(loss - expected) > 0.1 * expected
    assert (gradients[0] - expected_gradients[0]).norm() > 0.1 * expected_gradients[0].norm()


@pytest.mark.parametrize("family", FINISHED)
def test_the_comparison_while_healing_is_that_of_the_evaluation(family) -> None:
    student, teacher = MODELS[family](seed=1), MODELS[family](seed=2)

    def sums(**finishes: Any) -> Comparison:
        found = chunked_comparison(
            final_hidden_states(student, BLOCKS)[:, :-1].flatten(0, 1),
            student.lm_head.weight,
            final_hidden_states(teacher, BLOCKS)[:, :-1].flatten(0, 1),
            teacher.lm_head.weight,
            BLOCKS[:, 1:].flatten(),
            **finishes,
        )
        return Comparison.from_sums(found, BLOCKS[:, 1:].numel())

    found = sums(student_finish=logit_finish(student), teacher_finish=logit_finish(teacher))
    expected = plain_kl(student(BLOCKS).logits[:, :-1], teacher(BLOCKS).logits[:, :-1]).item()
    texts, agreements = compare({"teacher": teacher, "student": student}, BLOCKS)
    assert found.kl == pytest.approx(expected, rel=1e-4)
    assert agreements["student"].kl == pytest.approx(expected, rel=1e-4)
    assert found.perplexity == pytest.approx(texts["student"].perplexity, rel=1e-4)
    assert sums().kl != pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("family", FINISHED)
def test_a_healed_model_follows_plain_autograd(family, tmp_path: Path) -> None:
    """The loss of two steps and where they lead, against whole logits and AdamW."""
    teacher = MODELS[family](seed=2)
    student = MODELS[family](seed=1)
    reference = copy.deepcopy(student).requires_grad_(True)
    rate = 3e-3
    optimizer = torch.optim.AdamW(reference.parameters(), lr=rate, betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    losses = []
    for left in (1.0, 0.5):  # half a cosine
        loss = plain_kl(reference(BLOCKS).logits, teacher(BLOCKS).logits)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * left
        optimizer.step()

    settings = HealingSettings(
        tokens=2 * BLOCKS.numel(),
        tokens_per_step=BLOCKS.numel(),
        batch_size=2,
        attention_learning_rate=rate,
        learning_rate=rate,
        weight_decay=0.0,
        skew=0.0,
        hidden_weight=0.0,
    )
    report = heal(
        student, teacher, None, BLOCKS, settings=settings, output_dir=tmp_path, progress=False
    )
    assert [loss for _, loss in report.losses] == pytest.approx(losses, rel=1e-4)
    healed = dict(student.named_parameters())
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(healed[name], parameter, rtol=1e-3, atol=1e-4)


def test_a_function_in_place_of_the_head_leaves_no_trace() -> None:
    model = MODELS["gemma3"]()
    forward = model.forward
    model.forward = lambda **arguments: forward(**arguments)  # as accelerate wraps it
    wrapped = model.forward
    seen = []

    def look(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden.sum()

    total = with_head_input(model, model, BLOCKS, look)
    assert total == seen[0].sum()  # no soft cap over it
    assert model.forward is wrapped
    torch.testing.assert_close(seen[0], model.model(BLOCKS).last_hidden_state)


def test_a_module_that_is_not_reached_is_named() -> None:
    with pytest.raises(RuntimeError, match="Linear is not called"):
        arguments_at(torch.nn.Linear(2, 2), lambda: None)
