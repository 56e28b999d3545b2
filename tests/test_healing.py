"""Healing: the fused loss against plain autograd, and short runs on tiny random Llamas."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tests.conftest import make_tiny_llama
from tests.conversions import convert_tiny
from tpa_convert.errors import UserError
from tpa_convert.forward.divergence import default_chunk_tokens
from tpa_convert.forward.passes import CAUSAL_SDPA, block_forward
from tpa_convert.healing import (
    HealingInterrupted,
    HealingReport,
    HealingSettings,
    chunked_divergence,
    heal,
    parameter_groups,
    skewed_kl,
)
from tpa_convert.healing.monitoring.callbacks import GracefulStop
from tpa_convert.healing.training import run as healing_run
from tpa_convert.healing.training.checkpoints import newest_checkpoint
from tpa_convert.healing.training.data import (
    BlockDataset,
    blocks_that_fit,
    collate,
    largest_divisor,
)
from tpa_convert.healing.training.trainer import final_hidden_states, modules_to_compile

SETTINGS = HealingSettings(
    tokens=12 * 64,
    tokens_per_step=64,
    batch_size=4,
    attention_learning_rate=1e-2,
    learning_rate=3e-3,
    warmup_steps=2,
    save_steps=5,
)


def plain_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, skew: float = 0.0
) -> Tensor:
    teacher = torch.softmax(teacher_logits / temperature, -1)
    student = torch.softmax(student_logits / temperature, -1)
    ratio = torch.log(teacher) - torch.log(skew * teacher + (1 - skew) * student)
    return temperature**2 * (teacher * ratio).sum(-1).mean()


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
    optimizer = torch.optim.AdamW(groups, betas=healing_run.ADAM_BETAS)
    targets, target_states = layer_outputs(teacher, blocks)
    # Of two steps, half a cosine (the rates) and a line (the weight) leave the same.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 2)
    divergences = []
    for left in (1.0, 0.5):
        logits, states = layer_outputs(reference, blocks)
        divergence = loss = plain_kl(logits, targets, 2.0, HealingSettings.skew)
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


def perturbed(model: Any, seed: int) -> Any:
    """A copy with noise on the attention weights, as a lossy conversion leaves them."""
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "self_attn" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.5 * parameter.std() * noise
    return student


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_perturbed_copy_heals(
    gradient_checkpointing: bool, random_tokens: Any, tmp_path: Path
) -> None:
    teacher = make_tiny_llama()
    student = perturbed(teacher, seed=0)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    options = asdict(SETTINGS) | {
        "tokens": 60 * 64,
        "gradient_checkpointing": gradient_checkpointing,
    }
    report = heal(
        student,
        teacher,
        None,
        random_tokens(64, 16),
        settings=HealingSettings(**options),
        output_dir=tmp_path,
        valid_blocks=random_tokens(7, 16, seed=9),
        progress=True,
    )
    assert report.steps == 60
    assert report.tokens == 60 * 64
    assert report.resumed_from == 0
    assert report.valid_loss_after < 0.5 * report.valid_loss_before
    assert [step for step, _ in report.losses] == list(range(1, 61))
    assert report.losses[-1][1] < 0.5 * report.losses[0][1]
    assert json.loads(json.dumps(asdict(report)))["steps"] == 60

    # The models are left as they were found, but for the student's weights.
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert not student.training
    assert student.config.use_cache
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in student.modules())
    assert student(random_tokens(1, 4)).logits.shape == (1, 4, 128)


class StopAt(TrainerCallback):
    """Sends this process a signal during a given step."""

    def __init__(self, step: int, number: int):
        self.step = step
        self.number = number

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def run(output_dir: Path, blocks: Tensor, **changes: Any) -> tuple[HealingReport, Any]:
    teacher = make_tiny_llama()
    student = perturbed(teacher, seed=0)
    options = HealingSettings(**(asdict(SETTINGS) | changes))
    report = heal(
        student, teacher, None, blocks, settings=options, output_dir=output_dir, progress=False
    )
    return report, student


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_resumes_on_the_same_curve(
    number: int, random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = random_tokens(20, 16)  # fewer than the run needs, so that a second pass is resumed
    whole, expected = run(tmp_path / "whole", blocks)
    assert whole.resumed_from == 0
    assert len(whole.losses) == 12

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        trainer = healing_run.DistillationTrainer

        def interrupted_trainer(**kwargs: Any) -> Any:
            kwargs["callbacks"].append(StopAt(7, number))
            return trainer(**kwargs)

        patch.setattr(healing_run, "DistillationTrainer", interrupted_trainer)
        with pytest.raises(HealingInterrupted, match="step 8 of 12"):
            run(tmp_path / "parts", blocks)
    assert signal.getsignal(number) is handler

    # Another batch size may finish the run, and a half-written checkpoint is not used.
    (tmp_path / "parts" / "checkpoints" / "checkpoint-11").mkdir()
    report, student = run(tmp_path / "parts", blocks, batch_size=2)
    assert report.resumed_from == 8
    assert not (tmp_path / "parts" / "checkpoints" / "checkpoint-11").exists()
    assert report.steps == 12
    assert [step for step, _ in report.losses] == list(range(1, 13))
    torch.testing.assert_close(
        [loss for _, loss in report.losses],
        [loss for _, loss in whole.losses],
        rtol=1e-4,
        atol=1e-6,
    )
    for healed, reference in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(healed, reference, rtol=1e-3, atol=1e-4)

    # A finished run is loaded, not repeated.
    report, student = run(tmp_path / "parts", blocks)
    assert report.resumed_from == 12
    for healed, reference in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(healed, reference, rtol=1e-3, atol=1e-4)


def test_checkpoints_of_another_run_are_refused(random_tokens: Any, tmp_path: Path) -> None:
    run(tmp_path, random_tokens(8, 16), tokens=5 * 64)
    with pytest.raises(UserError, match="different learning_rate, text"):
        run(tmp_path, random_tokens(8, 16, seed=1), tokens=5 * 64, learning_rate=1e-4)
    report = heal(
        make_tiny_llama(seed=3),
        make_tiny_llama(),
        None,
        random_tokens(8, 16, seed=1),
        settings=HealingSettings(**(asdict(SETTINGS) | {"tokens": 64})),
        output_dir=tmp_path,
        resume=False,
        progress=False,
    )
    assert report.resumed_from == 0
    assert report.steps == 1


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, not 0"),
        ({"tokens_per_step": 0}, "tokens_per_step must be at least 1"),
        ({"block_length": 1}, "block_length must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"attention_learning_rate": float("nan")}, "attention_learning_rate must be a positive"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"warmup_steps": -1}, "warmup_steps must be zero or more"),
        ({"weight_decay": -0.1}, "weight_decay must be zero or more"),
        ({"hidden_weight": -1.0}, "hidden_weight must be zero or more"),
        ({"save_steps": 0}, "save_steps must be at least 1"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"trainable": "mlp"}, "trainable must be all, attention or lora, not mlp"),
    ],
)
def test_settings_are_validated(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HealingSettings(**change)


def test_bad_input_is_a_user_error(
    random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, blocks = make_tiny_llama(), random_tokens(8, 16)
    attempt = partial(heal, output_dir=tmp_path, settings=SETTINGS, progress=False)
    with pytest.raises(UserError, match=r"vocabularies differ \(64 and 128 tokens with"):
        attempt(make_tiny_llama(vocab_size=64), model, None, blocks)
    with pytest.raises(UserError, match=r"blocks must be a tensor \[N, L\]"):
        attempt(model, model, None, blocks[:0])
    with pytest.raises(UserError, match="multiple of the block length 15"):
        attempt(model, model, None, blocks[:, :15])
    with pytest.raises(UserError, match="documents need a tokenizer"):
        attempt(model, model, None, ["text"])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    offloaded = HealingSettings(**(asdict(SETTINGS) | {"offload_teacher": True}))
    with pytest.raises(UserError, match="leave out `offload_teacher`"):
        attempt(model, model, None, blocks, settings=offloaded)
    assert not (tmp_path / "checkpoints").exists()


def test_documents_are_tokenised(tmp_path: Path) -> None:
    words = WordLevel({f"w{i}": i for i in range(127)} | {"</s>": 127}, unk_token="w0")
    backend = Tokenizer(words)
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    documents = [" ".join(f"w{(i * j) % 127}" for i in range(40)) for j in range(20)]
    changes = {"tokens": 128, "block_length": 16}
    report = heal(
        make_tiny_llama(seed=1),
        make_tiny_llama(),
        tokenizer,
        documents,
        settings=HealingSettings(**(asdict(SETTINGS) | changes)),
        output_dir=tmp_path,
        progress=False,
    )
    assert report.steps == 2


def test_a_loss_that_is_not_finite_stops_the_run(random_tokens: Any, tmp_path: Path) -> None:
    student = make_tiny_llama(seed=1)
    with torch.no_grad():
        student.model.norm.weight[0] = 3e38
    with pytest.raises(UserError, match="healing loss is nan at step 1: use lower learning rates"):
        heal(
            student,
            make_tiny_llama(),
            None,
            random_tokens(8, 16),
            settings=SETTINGS,
            output_dir=tmp_path,
            progress=False,
        )


def test_a_run_that_leaves_its_source_stops(random_tokens: Any, tmp_path: Path) -> None:
    teacher = make_tiny_llama()
    changes = {"attention_learning_rate": 0.1, "learning_rate": 0.1, "save_steps": 2}
    far = replace(SETTINGS, tokens=40 * 64, **changes)
    with pytest.raises(UserError, match=r"loss rose from 0\.\d+ to 0\.\d+ by step \d+ \("):
        heal(
            copy.deepcopy(teacher),
            teacher,
            None,
            random_tokens(8, 16),
            settings=far,
            output_dir=tmp_path,
            progress=False,
        )
    assert newest_checkpoint(tmp_path / "checkpoints") is not None  # nothing saved is lost


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
            **asdict(SETTINGS) | {"tokens": 4 * 64, "torch_compile": compiled, "hidden_weight": 0.5}
        )
        folder = tmp_path / str(compiled)
        report = heal(
            copied, teacher, None, blocks, settings=options, output_dir=folder, progress=False
        )
        losses.append(report.losses)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


def test_batch_sizes() -> None:
    assert largest_divisor(32, 32) == 32
    assert largest_divisor(32, 28) == 16
    assert largest_divisor(30, 7) == 6
    assert largest_divisor(7, 0) == 1
    model = make_tiny_llama()
    assert blocks_that_fit(model, 1024, torch.device("cpu"), False) == 4
    assert blocks_that_fit(model, 100_000, torch.device("cpu"), False) == 1


@pytest.fixture
def default_interrupt() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in the background and a shell has it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("default_interrupt")
def test_second_signal_is_not_swallowed() -> None:
    with GracefulStop(announce=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_stops_early_when_it_has_recovered(random_tokens: Any, tmp_path: Path) -> None:
    teacher = make_tiny_llama()
    valid = random_tokens(8, 16, seed=9)

    def healed(name: str, **changes: Any) -> HealingReport:
        options = asdict(SETTINGS) | {"tokens": 60 * 64, "valid_steps": 10} | changes
        return heal(
            perturbed(teacher, seed=0),
            teacher,
            None,
            random_tokens(64, 16),
            settings=HealingSettings(**options),
            output_dir=tmp_path / name,
            valid_blocks=valid,
            progress=False,
        )

    whole = healed("whole")
    assert [step for step, _ in whole.valid_losses] == [0, 10, 20, 30, 40, 50, 60]
    assert not whole.recovered
    wanted = whole.valid_losses[3][1]  # reached at step 30
    early = healed("early", stop_at=math.expm1(wanted) * 1.001)
    assert early.recovered
    assert early.steps == 30
    assert early.tokens == 30 * 64
    assert early.valid_loss_after == pytest.approx(wanted, rel=1e-4)
    assert [step for step, _ in early.losses] == list(range(1, 31))

    with pytest.raises(UserError, match="`stop_at` needs held-out text"):
        heal(
            teacher,
            teacher,
            None,
            valid,
            settings=HealingSettings(stop_at=0.1),
            output_dir=tmp_path,
        )


def test_only_the_attention_is_trained_if_asked(random_tokens: Any, tmp_path: Path) -> None:
    teacher = make_tiny_llama()
    before = {name: p.clone() for name, p in perturbed(teacher, seed=0).named_parameters()}
    report, student = run(tmp_path, random_tokens(20, 16), trainable="attention")
    assert report.losses[-1][1] < report.losses[0][1]
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) != (".self_attn." in name), name


def test_a_larger_teacher_of_the_same_vocabulary(random_tokens: Any, tmp_path: Path) -> None:
    teacher = make_tiny_llama("mha", seed=4, hidden_size=48, num_hidden_layers=3, head_dim=12)
    student, blocks = make_tiny_llama(), random_tokens(40, 16)
    options = HealingSettings(**(asdict(SETTINGS) | {"tokens": 40 * 64, "torch_compile": False}))
    student_logits, teacher_logits = (m(blocks[:4]).logits[:, :-1] for m in (student, teacher))
    expected = plain_kl(student_logits, teacher_logits, 1.0)
    report = heal(
        student,
        teacher,
        None,
        blocks,
        settings=options,
        output_dir=tmp_path,
        progress=False,
        valid_blocks=blocks[:4],
    )
    assert report.valid_loss_before == pytest.approx(expected.item(), rel=1e-4)
    assert report.losses[-1][1] < 0.8 * report.losses[0][1]
    options = replace(options, hidden_weight=0.1)
    with pytest.raises(
        UserError, match=r"2 layers of width 32, the source 3 .* 48; set `hidden_wei"
    ):
        heal(student, teacher, None, blocks, settings=options, output_dir=tmp_path / "other")


@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_teacher_teaches_the_same(
    tied: bool, random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = random_tokens(20, 16)
    teacher = make_tiny_llama(tie_word_embeddings=tied)
    devices: list[str] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            devices.extend(p.device.type for p in teacher.model.layers.parameters())

    trainer = healing_run.DistillationTrainer
    monkeypatch.setattr(
        healing_run,
        "DistillationTrainer",
        lambda **kwargs: trainer(**{**kwargs, "callbacks": [*kwargs["callbacks"], Look()]}),
    )

    def healed(name: str, **changes: Any) -> HealingReport:
        return heal(
            perturbed(teacher, seed=0),
            teacher,
            None,
            blocks,
            settings=HealingSettings(**(asdict(SETTINGS) | {"tokens": 3 * 64} | changes)),
            output_dir=tmp_path / name,
            progress=False,
        )

    before = {name: p.clone() for name, p in teacher.named_parameters()}
    expected = healed("beside")
    assert set(devices) == {"cpu"}
    devices.clear()
    assert healed("offloaded", offload_teacher=True).losses == expected.losses
    assert set(devices) == {"meta"}
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert not any("forward" in vars(module) for module in teacher.modules())


def test_lora_trains_the_attention_and_adapters_that_end_merged(
    random_tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, settings = random_tokens(20, 16), {"trainable": "lora", "lora_rank": 2}
    start = perturbed(make_tiny_llama(), seed=0)
    report, student = run(tmp_path / "whole", blocks, **settings)
    assert report.losses[-1][1] < report.losses[0][1]
    assert student.state_dict().keys() == start.state_dict().keys()
    assert not hasattr(student, "peft_config")
    for (name, parameter), before in zip(
        student.named_parameters(), start.parameters(), strict=True
    ):
        change = (parameter - before).detach()
        assert bool(change.any()) == (".self_attn." in name or ".mlp." in name), name
        if ".mlp." in name:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2

    seen: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        trainer = healing_run.DistillationTrainer

        def interrupted_trainer(**kwargs: Any) -> Any:
            kwargs["callbacks"].append(StopAt(6, signal.SIGTERM))
            names = {id(p): name for name, p in kwargs["model"].named_parameters()}
            for group in kwargs["optimizer_cls_and_kwargs"][1]["params"]:
                seen.update({names[id(p)]: group["lr"] for p in group["params"]})
            return trainer(**kwargs)

        patch.setattr(healing_run, "DistillationTrainer", interrupted_trainer)
        with pytest.raises(HealingInterrupted):
            run(tmp_path / "parts", blocks, **settings)
    layer = "model.layers.0."
    assert {name for name in seen if name.startswith(layer) and "mlp" in name} == {
        f"{layer}mlp.{linear}.lora_{part}.default.weight"
        for linear in ("gate_proj", "up_proj", "down_proj")
        for part in "AB"
    }
    assert {rate for name, rate in seen.items() if "lora" in name} == {3e-3}
    assert {rate for name, rate in seen.items() if "lora" not in name} == {1e-2}
    resumed, again = run(tmp_path / "parts", blocks, **settings)
    assert resumed.resumed_from == 7
    for parameter, expected in zip(again.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'tpa-convert\[lora\]'"):
        run(tmp_path / "without", blocks, **settings)


@pytest.mark.gpu
def test_heals_on_a_gpu_in_bfloat16(random_tokens: Any, tmp_path: Path) -> None:
    teacher = make_tiny_llama()
    student = perturbed(teacher, seed=0)
    report = heal(
        student,
        teacher,
        None,
        random_tokens(64, 16),
        settings=HealingSettings(**(asdict(SETTINGS) | {"tokens": 60 * 64, "batch_size": None})),
        output_dir=tmp_path,
        valid_blocks=random_tokens(8, 16, seed=9),
        progress=False,
    )
    assert report.valid_loss_after < 0.6 * report.valid_loss_before
    assert report.peak_memory_bytes > 0
    assert next(student.parameters()).dtype == torch.float32
