"""Objectives and speed of healing: gradients, losses and settings against independent ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.benchmarks import benchmark, record_rows, run_main
from tests.command_line import save_source, save_text
from tests.conftest import make_tiny_llama
from tests.healing import perturbed, plain_kl
from tpa_convert.healing import HealingReport, HealingSettings, heal
from tpa_convert.healing.training import preparation
from tpa_convert.healing.training.flops import flops_per_token
from tpa_convert.healing.training.hardware import peak_flops
from tpa_convert.modeling import LayerShape


@pytest.fixture
def objectives(monkeypatch: pytest.MonkeyPatch) -> Any:
    # main() and the tests put other trainers there
    monkeypatch.setattr(preparation, "DistillationTrainer", preparation.DistillationTrainer)
    return benchmark("objectives_smollm2")


def random_logits() -> Tensor:
    return torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon"])
def test_divergences_and_their_gradients(objectives, name: str) -> None:
    divergence = getattr(objectives, name)
    student, teacher = random_logits()
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    middle = ((p + q) / 2).log()
    expected = {
        "reverse_kl": (q * (log_q - log_p)).sum(),
        "jensen_shannon": ((q * (log_q - middle)).sum() + (p * (log_p - middle)).sum()) / 2,
    }[name]
    value, gradient = divergence(student.requires_grad_(), teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(value, student)[0])
    assert divergence(teacher, teacher)[0].abs() < 1e-5


def test_hard_labels(objectives) -> None:
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([3, -1, 0, 10])
    value, gradient = objectives.cross_entropy(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def first_loss(trainer: Any, directory: Path, blocks: Tensor) -> float:
    """The loss that a trainer reports of one step on all blocks."""
    preparation.DistillationTrainer = trainer
    teacher = make_tiny_llama()
    settings = HealingSettings(
        tokens=blocks.numel(),
        tokens_per_step=blocks.numel(),
        batch_size=4,
        hidden_weight=0.0,
        skew=0.0,
    )
    report = heal(
        perturbed(teacher, seed=0),
        teacher,
        None,
        blocks,
        settings=settings,
        output_dir=directory,
        progress=False,
    )
    return report.losses[0][1]


def test_hard_labels_have_their_share_of_the_loss(objectives, random_tokens, tmp_path) -> None:
    """The last token of a sequence has no label, but counts in the mean."""
    blocks = random_tokens(8, 16)
    teacher = make_tiny_llama()
    student = perturbed(teacher, seed=0)(blocks).logits
    soft = plain_kl(student, teacher(blocks).logits)
    hard = torch.nn.functional.cross_entropy(
        student[:, :-1].flatten(0, 1), blocks[:, 1:].flatten(), reduction="sum"
    )
    for share in (0.0, 0.3):

        def trainer(share: float = share, **kwargs: Any) -> Any:
            return objectives.HardLabels(share=share, **kwargs)

        expected = (1 - share) * soft + share * hard / blocks.numel()
        found = first_loss(trainer, tmp_path / str(share), blocks)
        assert found == pytest.approx(expected.item(), rel=1e-4)


def test_attention_outputs_are_matched(objectives, random_tokens, tmp_path) -> None:
    blocks = random_tokens(4, 16)  # one batch, since the distance is relative to the batch
    teacher = make_tiny_llama()
    student = perturbed(teacher, seed=0)
    distances = []
    with (
        objectives.recorded(objectives.attention_layers(teacher)) as targets,
        objectives.recorded(objectives.attention_layers(student)) as outputs,
    ):
        kl = plain_kl(student(blocks).logits, teacher(blocks).logits)
    assert len(targets) == len(outputs) == 2
    for output, target in zip(outputs, targets, strict=True):
        distances.append((output - target).square().sum() / target.square().sum())
    expected = kl + sum(distances) / 2
    found = first_loss(objectives.AttentionOutputs, tmp_path, blocks)
    assert found == pytest.approx(expected.item(), rel=1e-4)
    assert not any(layer._forward_hooks for layer in objectives.attention_layers(student))


def test_each_row_changes_what_it_names(objectives, tmp_path, monkeypatch) -> None:
    rows, healed = record_rows(monkeypatch), {}

    def heal_row(table: Any, name: str, student: Any, *_: Any, **changes: Any) -> None:
        healed[name] = (changes, preparation.DistillationTrainer)
        # every row starts from the same refined model, which no earlier row has trained
        tokens = torch.arange(3, 20)[None]
        assert torch.equal(student(tokens).logits, rows[-1].model(tokens).logits)
        with torch.no_grad():
            student.model.norm.weight.zero_()

    monkeypatch.setattr(objectives, "heal_row", heal_row)
    source = save_source(tmp_path / "source")
    train, valid = (save_text(tmp_path / name) for name in ("train.txt", "valid.txt"))
    options = ["--train", train, "--valid", valid, "--valid-blocks", 1, "--length", 64]
    options += ["--run", "16:latent", "--calibration-blocks", 2, "--refine-steps", 1]
    given = {"seed": 1, "learning_rate": 3e-4}
    options += ["--settings", "seed=1,learning_rate=3e-4"]
    run_main("objectives_smollm2", monkeypatch, source, *options)
    assert [row.name for row in rows] == ["source", "refined"]
    assert list(healed) == list(objectives.ROWS)
    default = HealingSettings().with_rates(coded=False)
    plain = objectives.DistillationTrainer
    assert healed["skewed KL, 0.1"] == (given, plain)
    assert healed["forward KL"] == (given | {"skew": 0.0}, plain)
    assert healed["reverse KL"] == (given | {"divergence": objectives.reverse_kl}, plain)
    assert healed["attention outputs"][1] is objectives.AttentionOutputs
    assert healed["hard labels, 0.3"][1].keywords == {"share": 0.3}
    assert healed["rates doubled"][0] == {
        "seed": 1,
        "learning_rate": pytest.approx(6e-4),
        "attention_learning_rate": pytest.approx(2 * default.attention_learning_rate),
    }
    tokens = healed["steps of half the tokens"][0]["tokens_per_step"]
    assert (tokens, type(tokens)) == (default.tokens_per_step // 2, int)
    for changes, _ in healed.values():  # all can be run
        HealingSettings(**{k: v for k, v in changes.items() if k != "divergence"})


# ------------------------------------------------------------------------------- speed

SMALL = {"intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with small models and steps, on a CPU."""
    script = benchmark("heal_throughput")
    sizes = {"135m": 72, "135m-third": 576, "135m-coded": 576, "1b": 256}
    for shape, hidden_size in sizes.items():
        small = script.SHAPES[shape] | SMALL | {"hidden_size": hidden_size}
        monkeypatch.setitem(script.SHAPES, shape, small)
    monkeypatch.setattr(script, "LENGTH", 8)
    monkeypatch.setattr(script, "BLOCKS", 16)
    return script


@pytest.mark.parametrize("shape", ["135m", "135m-third", "135m-coded", "1b"])
def test_models_of_a_shape(throughput, shape: str) -> None:
    student, teacher = throughput.random_models(shape)
    for key, value in throughput.SHAPES[shape].items():
        assert getattr(teacher.config, key) == value
    assert (student.dtype, teacher.dtype) == (torch.float32, torch.bfloat16)
    if shape == "135m":
        for one, other in zip(student.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(one.to(torch.bfloat16), other)
    elif shape in throughput.CODED:
        groups = teacher.config.num_key_value_heads
        source_bytes = 2 * 2 * groups * teacher.config.head_dim
        for layer in student.config.tpa_layers:
            cached = LayerShape(**layer).cached_bytes(groups)
            assert 0.9 * source_bytes / 8 <= cached <= source_bytes / 8
    else:
        floats = sum(throughput.CONVERTED[shape]["widths"])
        assert student.config.cached_floats == [floats] * 2
        source_floats = 2 * teacher.config.num_key_value_heads * teacher.config.head_dim
        assert floats <= 0.35 * source_floats or shape == "1b"  # whose heads are narrowed here
    again, _ = throughput.random_models(shape)
    assert all(map(torch.equal, student.parameters(), again.parameters()))


@pytest.mark.parametrize(("shape", "batch_size"), [("135m", 8), ("1b", 4)])
def test_losses_and_arithmetic_of_a_run(throughput, shape, batch_size, monkeypatch) -> None:
    """The first loss is that of both models on the first blocks; MFU follows from the speed."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A10G")
    peak = peak_flops("NVIDIA A10G")
    available = {"there": False}
    heal_there = throughput.heal

    def heal_on_the_cpu(*arguments: Any, **keywords: Any) -> Any:
        report = heal_there(*arguments, **keywords)
        available["there"] = True  # for the peak, which is asked for after the run
        return report

    monkeypatch.setattr(throughput, "heal", heal_on_the_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available["there"])
    changes = {"seed": 1, "skew": 0.0, "hidden_weight": 0.0, "bf16": False}
    report, mfu = throughput.time_healing(shape, batch_size, "nothing", 1, changes)
    assert report.batch_size == batch_size
    assert [step for step, _ in report.losses] == [1]
    student, teacher = throughput.random_models(shape)
    blocks = torch.randint(99, (16, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain_kl(student(blocks).logits, teacher(blocks).logits.float())
    assert report.losses[0][1] == pytest.approx(expected.item(), rel=0.02, abs=1e-5)
    speed = report.tokens_per_second or 0
    assert mfu == pytest.approx(flops_per_token(student, teacher, 8) * speed / peak)


def test_variants_are_run_in_their_order(throughput, monkeypatch, capsys) -> None:
    report = HealingReport
    runs = []

    def time_healing(*arguments: Any) -> Any:
        runs.append(arguments)
        found = dict.fromkeys(report.__dataclass_fields__, 0)
        found |= {"batch_size": arguments[1], "losses": [(1, 0.5), (2, 0.25)]}
        found |= {"tokens_per_second": 1234.0, "peak_memory_bytes": 5e8, "seconds": 9.0}
        return report(**found), 0.25

    monkeypatch.setattr(throughput, "time_healing", time_healing)
    options = ["--no-loss", "--variants", "b8-eager", "b16-layers", "--steps", "2"]
    options += ["--settings", "seed=1", "skew=0.5"]
    run_main("heal_throughput", monkeypatch, "--shape", "1b", *options)
    assert runs == [
        ("1b", 8, "nothing", 2, {"seed": 1}),
        ("1b", 8, "nothing", 2, {"skew": 0.5}),
        ("1b", 16, "layers", 2, {"seed": 1}),
        ("1b", 16, "layers", 2, {"skew": 0.5}),
    ]
    lines = capsys.readouterr().out.splitlines()[-4:]
    cells = "| 1,234 | 25.0% | 0.5 | 9 | 1: 0.50000, 2: 0.25000 |"
    assert lines[0] == f"| 8 | nothing | seed=1 {cells}"
    assert lines[3] == f"| 16 | layers | skew=0.5 {cells}"
    runs.clear()
    run_main("heal_throughput", monkeypatch, "--no-loss", "--seconds", "-1")
    assert not runs
    assert capsys.readouterr().out.count("left out, time is up") == 5
