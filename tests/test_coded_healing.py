"""Training models whose cache is coded in bits: gradients, equal widths, healing."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from tests.command_line import error_of, save_source, save_text, tpa_convert
from tests.conftest import make_tiny_llama, make_tiny_tokenizer
from tests.conversions import coded_moments, convert_coded, random_blocks
from tests.healing import SETTINGS
from tests.tiny_models import MODELS
from tpa_convert.export.save import load_model, read_provenance
from tpa_convert.forward.comparison import agreement
from tpa_convert.healing import HealingSettings, heal
from tpa_convert.healing.training.widths import MULTIPLE_OF, even_widths
from tpa_convert.modeling.tpa_attention import TPAAttention
from tpa_convert.pipeline.recoding import coded_student
from tpa_convert.refinement.least_squares import refit
from tpa_convert.refinement.regression import RefinementSettings, refine

NAMES = ["llama", "gemma3"]


@pytest.fixture(scope="module", params=NAMES)
def source(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


@pytest.fixture(scope="module", params=[1, 2], ids=["one block", "two blocks"])
def coded(request: pytest.FixtureRequest, source) -> PreTrainedModel:
    model = convert_coded(source, key_blocks=request.param, kv_ratio=0.1875)
    widths = {(shape.width_k, shape.width_v) for shape in model.config.layer_shapes}
    assert len(widths) > 1  # layers of one width would not be padded differently
    return model


def attentions(model: PreTrainedModel) -> list[TPAAttention]:
    return [module for module in model.modules() if isinstance(module, TPAAttention)]


def text() -> Tensor:
    return random_blocks(count=2, length=24, seed=5)


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def loss(model: PreTrainedModel) -> Tensor:
    return model(text(), labels=text(), use_cache=False).loss


# ------------------------------------------------------------------------------- gradients


def test_gradients_pass_the_rounding(coded) -> None:
    """A step against the gradient lowers the loss, also of what is in front of the codes alone."""
    model = copy.deepcopy(coded)
    projections = [
        module.feature_factor.weight
        for attention in attentions(model)
        for module in (attention.keys, attention.values)
    ]
    for weight in projections:
        weight.requires_grad_(True)
    before = loss(model)
    gradients = torch.autograd.grad(before, projections)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    size = torch.stack([gradient.norm() for gradient in gradients]).norm()

    def after(step: float) -> float:
        with torch.no_grad():
            for weight, gradient in zip(projections, gradients, strict=True):
                weight -= step / size * gradient
            found = loss(model).item()
            for weight, gradient in zip(projections, gradients, strict=True):
                weight += step / size * gradient
        return found

    assert after(0.3) < before.item() < after(-0.3)


# ------------------------------------------------------------------------------- equal widths


def test_even_widths_change_nothing_and_are_undone(coded) -> None:
    model = copy.deepcopy(coded)
    expected, before = model(text(), use_cache=False).logits, state(model)
    blocks = [shape.key_block_widths for shape in model.config.layer_shapes]
    with even_widths(model):
        found = model(text(), use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        shapes = [  # of all but what places codes in rows, of which training makes none
            {name: x.shape for name, x in state(attention).items() if ".row_" not in name}
            for attention in attentions(model)
        ]
        assert all(shape == shapes[0] for shape in shapes)
        assert shapes[0]["keys.feature_factor.weight"][0] % MULTIPLE_OF == 0
        for attention in attentions(model):  # negative control: one code more that says something
            attention.keys.coder.highest[attention.keys.coder.highest == 0] = 1
        assert (model(text(), use_cache=False).logits - expected).abs().max() > 1e-2
    assert [attention.keys.gauge.widths for attention in attentions(model)] == blocks
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_even_widths_are_undone_after_a_failure(coded) -> None:
    model = copy.deepcopy(coded)
    before = state(model)
    with pytest.raises(RuntimeError, match="interrupted"), even_widths(model):
        raise RuntimeError("interrupted")
    assert all(torch.equal(state(model)[name], tensor) for name, tensor in before.items())


def padded_entries(model: PreTrainedModel) -> dict[str, Tensor]:
    """Which entries of every parameter are padding: those that a mark does not reach."""
    marked = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in marked.parameters():
            parameter.fill_(1.0)
    with even_widths(marked):
        return {name: parameter == 0 for name, parameter in marked.named_parameters()}


def test_gradients_of_padding_are_zero(coded) -> None:
    model = copy.deepcopy(coded).requires_grad_(True)
    padding = padded_entries(model)
    plain = dict(zip(*gradients(model), strict=True))
    with even_widths(model):
        found = dict(zip(*gradients(model), strict=True))
    assert sum(int(mask.sum()) for mask in padding.values()) > 100
    for name, gradient in found.items():
        assert (gradient[padding[name]] == 0).all(), name
        kept = gradient[~padding[name]]
        torch.testing.assert_close(kept, plain[name].flatten(), atol=1e-4, rtol=1e-3)
        # negative control: what is no padding does have gradients
        assert kept.abs().max() > 0, name


def gradients(model: PreTrainedModel) -> tuple[list[str], list[Tensor]]:
    """Of all parameters of the attention."""
    named = {name: p for name, p in model.named_parameters() if "self_attn" in name}
    return list(named), list(torch.autograd.grad(loss(model), list(named.values())))


# ------------------------------------------------------------------------------- healing


def divergence(source: PreTrainedModel, model: PreTrainedModel) -> float:
    return agreement(source, model, random_blocks(count=32, length=32, seed=9)).kl


def test_healing_lowers_the_loss(source, coded, tmp_path) -> None:
    before = divergence(source, coded)

    def healed(teacher: PreTrainedModel, name: str, **changes: Any) -> PreTrainedModel:
        student = copy.deepcopy(coded)
        settings = HealingSettings(
            tokens=24 * 256,
            tokens_per_step=256,
            block_length=32,
            attention_learning_rate=3e-4,
            learning_rate=3e-4,
            warmup_steps=4,
            hidden_weight=0.0,
            **changes,
        )
        heal(
            student,
            copy.deepcopy(teacher),
            None,
            random_blocks(count=64, length=32, seed=4),
            settings=settings,
            output_dir=tmp_path / name,
            progress=False,
        )
        return student

    student = healed(source, "source")
    assert divergence(source, student) < 0.92 * before
    assert student.config.cached_bytes == coded.config.cached_bytes
    shapes = {name: tensor.shape for name, tensor in coded.state_dict().items()}
    assert {name: tensor.shape for name, tensor in student.state_dict().items()} == shapes
    # what training saw is what the cache gives
    with torch.no_grad():
        whole = student(text(), use_cache=False).logits
        torch.testing.assert_close(student(text(), use_cache=True).logits, whole, atol=1e-4, rtol=0)
    other = MODELS[NAMES[1 - NAMES.index(family(source))]](seed=8)
    assert divergence(source, healed(other, "another")) > 0.92 * before


def test_layers_with_different_codes_share_one_compiled_graph(tmp_path, monkeypatch) -> None:
    """Nothing that is read in training may tell one padded layer from the next."""
    source = make_tiny_llama(num_hidden_layers=4)
    student = convert_coded(source, kv_ratio=0.1875)
    assert len({shape.key_codes for shape in student.config.layer_shapes}) > 1
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    options = SETTINGS.model_copy(
        update={"torch_compile": True, "tokens": 3 * 64, "hidden_weight": 0.0}
    )
    blocks = random_blocks(count=16, length=32, seed=4)
    heal(student, source, None, blocks, settings=options, output_dir=tmp_path, progress=False)
    # A layer and the final norm, of student and teacher, and the loss.
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]


@pytest.mark.parametrize("improve", ["refit", "refine"])
def test_refit_and_refinement_lower_the_loss_of_codes(source, coded, improve) -> None:
    model, blocks = copy.deepcopy(coded), random_blocks(count=256, length=32, seed=3)
    if improve == "refit":
        report: Any = refit(source, model, blocks)
    else:
        settings = RefinementSettings(steps=40, batch_size=8, checks=4)
        report = refine(source, model, blocks, settings)
    assert all(layer.after <= layer.before for layer in report)
    assert any(layer.after < layer.before for layer in report)
    assert divergence(source, model) < 0.95 * divergence(source, coded)
    assert model.config.cached_bytes == coded.config.cached_bytes


def family(model: PreTrainedModel) -> str:
    return next(
        name for name in NAMES if MODELS[name]().config.model_type == model.config.model_type
    )


def test_layers_of_several_numbers_of_blocks_are_left_as_they_are(source) -> None:
    """There is no width that suits them all; training works without one."""
    moments = coded_moments(source)
    one = convert_coded(source, moments=moments, key_blocks=1)
    layers = list(one.config.tpa_layers)
    layers[1] = convert_coded(source, moments=moments, key_blocks=2).config.tpa_layers[1]
    config = copy.deepcopy(one.config)
    config.tpa_layers = layers
    mixed = type(one)(config)
    before = state(mixed)
    with even_widths(mixed):
        assert {n: t.shape for n, t in state(mixed).items()} == {
            n: t.shape for n, t in before.items()
        }


# ------------------------------------------------------------------- from plain numbers to codes


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a text and a conversion with latent keys in 16 bits."""
    folder = tmp_path_factory.mktemp("plain")
    save_source(folder / "source")
    save_text(folder / "text.txt")
    options = ["--cache-bits", 16, "--key-cache", "latent", "--gauge", "applied"]
    result = tpa_convert(
        "convert", folder / "source", "--kv-ratio", 0.75, *options, "--block-length", 32,
        "--calibration-blocks", 8, "--out", folder / "plain",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder


HEAL = ["--tokens", 512, "--tokens-per-step", 128, "--block-length", 32]


def test_healing_takes_a_plain_model_to_a_coded_one(plain, tmp_path) -> None:
    options = ["--text", plain / "text.txt", *HEAL]
    result = tpa_convert(
        "heal", plain / "plain", *options, "--kv-ratio", 0.25, "--out", tmp_path / "coded"
    )
    assert result.exit_code == 0, result.output
    model = load_model(tmp_path / "coded", dtype=torch.float32)
    assert all(shape.coded for shape in model.config.layer_shapes)
    record = read_provenance(tmp_path / "coded")
    earlier = read_provenance(plain / "plain")
    assert record["convert"]["plan"]["kv_bytes"] <= 128 / 4
    assert record["convert"]["earlier"]["convert"] == earlier["convert"]
    assert record["source"] == earlier["source"]
    # Without a step of training it is near the plain model, from which other weights are far.
    dense = load_model(plain / "plain", dtype=torch.float32)
    tokenizer = make_tiny_tokenizer()
    coded, _ = coded_student(dense, tokenizer, earlier, 0.5)
    blocks = random_blocks(count=4, length=24, seed=5)
    near, far = (
        agreement(dense, coded, blocks).kl,
        agreement(dense, make_tiny_llama(seed=7), blocks).kl,
    )
    assert 0 < near < 0.1 * far
    # A coded model heals further, in the bits that it has, and in no others.
    again = ("heal", tmp_path / "coded", *options, "--out", tmp_path / "again")
    assert "coded in bits already" in error_of(tpa_convert(*again, "--kv-ratio", 0.25))
    assert tpa_convert(*again).exit_code == 0
    healed = load_model(tmp_path / "again", dtype=torch.float32)
    assert healed.config.tpa_layers == model.config.tpa_layers


def test_a_gauge_that_queries_have_taken_in_cannot_be_coded(plain, tmp_path) -> None:
    options = ["--cache-bits", 16, "--gauge", "absorbed", "--calibration-blocks", 8]
    result = tpa_convert(
        "convert", plain / "source", "--kv-ratio", 0.5, *options, "--block-length", 32,
        "--out", tmp_path / "absorbed",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    result = tpa_convert(
        "heal", tmp_path / "absorbed", "--text", plain / "text.txt", *HEAL, "--kv-ratio", 0.25,
        "--out", tmp_path / "coded",
    )  # fmt: skip
    assert "its queries have taken the gauge" in error_of(result)
