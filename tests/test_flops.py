"""The arithmetic of healing, against torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import make_tiny_llama
from tests.conversions import convert_tiny
from tpa_convert.healing.training.flops import flops_per_token


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gauge", ["absorbed", "applied"])
@pytest.mark.parametrize("keys", ["rotated", "latent"])
def test_flops_of_a_token(tied: bool, gauge: Any, keys: Any, random_tokens: Any) -> None:
    teacher = make_tiny_llama(num_hidden_layers=3, tie_word_embeddings=tied)
    student = convert_tiny(teacher, gauge=gauge, key_cache=keys, width_k=12, width_v=8)
    student.requires_grad_(True)
    teacher.set_attn_implementation("eager")  # full squares, where every product is counted
    student.set_attn_implementation("eager")
    tokens = random_tokens(2, 64)

    def counted() -> float:
        with FlopCounterMode(display=False) as counter:
            teacher(tokens)
            student(tokens).logits.sum().backward()
        return counter.get_total_flops() / tokens.numel()

    # A full square is what a causal one of twice the length costs.
    expected = flops_per_token(student, teacher, 2 * tokens.shape[1])
    assert counted() == pytest.approx(expected, rel=0.03)
    assert flops_per_token(student, teacher, 64) < 0.9 * expected
