"""How the trainer runs models: parameter groups, masks, precision, compilation, data, batches."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.conftest import make_tiny_llama
from tests.conversions import convert_tiny
from tests.healing import SETTINGS, run
from tpa_convert.forward.passes import CAUSAL_SDPA, block_forward
from tpa_convert.healing import HealingSettings, heal, parameter_groups
from tpa_convert.healing.training.data import (
    BlockDataset,
    blocks_that_fit,
    collate,
    largest_divisor,
)
from tpa_convert.healing.training.trainer import final_hidden_states, modules_to_compile


def test_parameter_groups() -> None:
    model = make_tiny_llama(attention_bias=True, tie_word_embeddings=True).requires_grad_(True)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    groups = parameter_groups(
        model, attention_learning_rate=6e-4, learning_rate=2e-4, weight_decay=0.1
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert found["model.layers.0.self_attn.q_proj.weight"] == (6e-4, 0.1)
    assert found["model.layers.1.self_attn.k_proj.bias"] == (6e-4, 0.0)
    assert found["model.layers.1.mlp.up_proj.weight"] == (2e-4, 0.1)
    assert found["model.layers.0.input_layernorm.weight"] == (2e-4, 0.0)
    assert found["model.embed_tokens.weight"] == (2e-4, 0.1)


def test_block_forward_needs_no_mask_and_changes_nothing(random_tokens: Any) -> None:
    model, tokens = make_tiny_llama(), random_tokens(3, 16)
    expected = model(tokens).logits
    with block_forward(model):
        assert model.config._attn_implementation == CAUSAL_SDPA
        hidden = final_hidden_states(model, tokens)
        masks: list[Any] = []
        hook = model.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        hook.remove()
    assert masks == [None]
    torch.testing.assert_close(model.lm_head(hidden), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widths", [(16, 6), (8, 14)])
def test_uneven_widths_take_flash_attention(widths: tuple[int, int], random_tokens: Any) -> None:
    model = convert_tiny(make_tiny_llama(), gauge="absorbed", width_k=widths[0], width_v=widths[1])
    tokens = random_tokens(3, 16)
    expected = model(tokens).logits
    with block_forward(model), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(tokens)  # the kernel alone


def test_the_residual_stream_is_bfloat16_under_autocast(random_tokens: Any) -> None:
    """All of it: fp32 weights of norms and gauges promote nothing."""
    model, tokens = convert_tiny(make_tiny_llama(), gauge="applied"), random_tokens(3, 16)
    expected = model(tokens).logits
    found = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: found.append(args[0].dtype))
        for module in (*model.model.layers, model.model.norm)
    ]
    with block_forward(model, autocast=True), torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens).logits
    assert found == [torch.bfloat16] * 3
    error = (logits.float() - expected).square().mean().sqrt()
    assert error < 0.05 * expected.std()
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(tokens).logits, expected)


@given(blocks=st.integers(1, 12), samples=st.integers(1, 40), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_blocks_are_all_seen_equally_often(blocks: int, samples: int, seed: int) -> None:
    dataset = BlockDataset(torch.arange(blocks)[:, None], samples, seed)
    batch = collate(dataset.__getitems__(range(len(dataset))))["input_ids"]
    assert batch.shape == (samples, 1)
    assert [int(dataset[i]) for i in range(samples)] == batch[:, 0].tolist()
    counts = batch[:, 0].bincount(minlength=blocks)
    assert counts.max() - counts.min() <= 1
    again = BlockDataset(torch.arange(blocks)[:, None], samples, seed)
    assert torch.equal(dataset.order, again.order)


@pytest.mark.parametrize(
    ("gradient_checkpointing", "hidden_weight"), [(False, 0.0), (True, 0.0), (True, 0.5)]
)
def test_compiled_runs_have_the_same_losses_and_few_graphs(
    gradient_checkpointing: bool,
    hidden_weight: float,
    random_tokens: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = random_tokens(64, 16)
    changes = {"tokens": 5 * 64, "hidden_weight": hidden_weight}
    expected, _ = run(tmp_path / "eager", blocks, **changes)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    report, _ = run(
        tmp_path / "compiled",
        blocks,
        **changes,
        torch_compile=True,
        gradient_checkpointing=gradient_checkpointing,
    )
    torch.testing.assert_close(report.losses, expected.losses, rtol=1e-4, atol=1e-6)
    # A layer and the final norm, of student and teacher, and the loss, which may have two parts;
    # nothing is compiled twice.
    assert counters["stats"]["unique_graphs"] == 5 + bool(hidden_weight)
    assert not counters["graph_break"]


def test_layers_of_different_shapes_are_compiled_together(
    random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their hidden states are matched all the same."""
    teacher, blocks = make_tiny_llama(seed=1), random_tokens(20, 16)

    def uneven() -> Any:
        model = make_tiny_llama()
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(model.model.layers[1].mlp, name)
            shape = [size // 2 if size == 64 else size for size in linear.weight.shape]
            setattr(model.model.layers[1].mlp, name, torch.nn.Linear(*shape[::-1], bias=False))
        return model

    student = uneven()
    assert modules_to_compile(teacher) == [*teacher.model.layers, teacher.model.norm]
    assert modules_to_compile(student) == [student.model]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses = []
    for compiled in (False, True):
        copied = copy.deepcopy(student)
        options = HealingSettings(
            **dict(SETTINGS) | {"tokens": 4 * 64, "torch_compile": compiled, "hidden_weight": 0.5}
        )
        folder = tmp_path / str(compiled)
        report = heal(
            copied, teacher, None, blocks, settings=options, output_dir=folder, progress=False
        )
        losses.append(report.losses)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


def test_batches_leave_room_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are still in main memory when a run is prepared take theirs later."""
    model, free = make_tiny_llama(), 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    gpu = torch.device("cuda")
    few, many = (blocks_that_fit(model, 64, gpu, False, awaited=n) for n in (free // 2, 0))
    assert 1 < few == pytest.approx(many / 2, rel=0.05)
    assert blocks_that_fit(model, 64, gpu, False, shards=4, awaited=2 * free) >= few - 1
    assert blocks_that_fit(model, 64, gpu, False, awaited=2 * free) == 1


def test_batch_sizes() -> None:
    assert largest_divisor(32, 32) == 32
    assert largest_divisor(32, 28) == 16
    assert largest_divisor(30, 7) == 6
    assert largest_divisor(7, 0) == 1
    model = make_tiny_llama()
    assert blocks_that_fit(model, 1024, torch.device("cpu"), False) == 4
    assert blocks_that_fit(model, 100_000, torch.device("cpu"), False) == 1
