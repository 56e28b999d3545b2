"""Moments against a brute-force computation from the model's own attention weights."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.conversions import random_blocks, source_of
from tpa_convert.calibration.moments import Moments, collect_moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.decomposition import LayerMoments
from tpa_convert.errors import UserError
from tpa_convert.plans import Budget, plan_uniform

BLOCKS = random_blocks(count=5, length=14, seed=3)
GROUPS, HEADS, HEAD_DIM, PAIRS = 2, 4, 8, 4


def differences(left: LayerMoments, right: LayerMoments) -> dict[str, float]:
    """Largest difference of each field, relative to its largest entry."""
    pairs = {f.name: (getattr(left, f.name), getattr(right, f.name)) for f in fields(LayerMoments)}
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


class Observed(NamedTuple):
    """What one layer of the model did, float64: one entry per block."""

    inputs: Tensor  # [N, t, D]
    query: Tensor  # rotated, [N, h, t, d]
    key: Tensor  # rotated, [N, g, t, d]
    plain_key: Tensor  # [N, g, t, d]
    value: Tensor  # [N, g, t, d]
    attention: Tensor  # [N, h, t, t]


def observe(model: LlamaForCausalLM) -> list[Observed]:
    """Runs the model with eager attention and takes everything from its own modules."""
    model.set_attn_implementation("eager")
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "input_layernorm")):
            hooks.append(
                module.register_forward_hook(
                    lambda _, args, output, name=name: seen.__setitem__(name, output.double())
                )
            )
    attentions = model(BLOCKS, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation("sdpa")
    positions = torch.arange(BLOCKS.shape[1])[None]
    cos, sin = (t.double() for t in model.model.rotary_emb(torch.zeros(1), positions))
    layers = []
    for i, attention in enumerate(attentions):
        prefix = f"model.layers.{i}."
        query, key, value = (
            seen[f"{prefix}self_attn.{n}_proj"].unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for n in "qkv"
        )
        rotated_query, rotated_key = apply_rotary_pos_emb(query, key, cos, sin)
        inputs = seen[f"{prefix}input_layernorm"]
        layers.append(Observed(inputs, rotated_query, rotated_key, key, value, attention.double()))
    return layers


def brute_force(observed: Observed) -> LayerMoments:
    """One block, query position and head after the other."""
    blocks, length = BLOCKS.shape
    queries = blocks * length
    pair = torch.zeros(PAIRS, GROUPS, GROUPS, dtype=torch.complex128)
    key_covariance = torch.zeros(GROUPS * HEAD_DIM, GROUPS * HEAD_DIM, dtype=torch.float64)
    value_covariance = torch.zeros_like(key_covariance)
    hidden = observed.inputs.shape[-1]
    second, mean = key_covariance.new_zeros(hidden, hidden), key_covariance.new_zeros(hidden)
    key_mean = key_covariance.new_zeros(GROUPS * HEAD_DIM)
    energy = key_covariance.new_zeros(GROUPS, PAIRS)
    for n in range(blocks):
        rotated = torch.complex(*observed.key[n].chunk(2, -1))  # [g, t, f]
        plain = observed.plain_key[n].transpose(0, 1).flatten(1)  # [t, g d]
        value = observed.value[n].transpose(0, 1).flatten(1)
        inputs = observed.inputs[n]
        for s in range(length):
            p = observed.attention[n, :, s]  # [h, t]
            average = p.mean(0)
            for f in range(PAIRS):
                centred = rotated[..., f] - rotated[..., f] @ average.to(rotated.dtype)[:, None]
                pair[f] += (average * centred) @ centred.mH
            centred = plain - average @ plain
            key_covariance += (average[:, None] * centred).mT @ centred
            for h in range(HEADS):
                mixed = p[h] @ value
                value_covariance += mixed.outer(mixed) / HEADS
                q = torch.complex(*observed.query[n, h, s].chunk(2))
                energy[h // (HEADS // GROUPS)] += q.abs().square()
            key_mean += average @ plain
            second += (average[:, None] * inputs).mT @ inputs
            mean += average @ inputs
    second, mean = second / queries, mean / queries
    damping = 1e-6 * second.trace() / hidden * torch.eye(hidden, dtype=torch.float64)
    functional = torch.linalg.inv(second + damping) @ mean
    return LayerMoments(
        pair_covariance=pair / queries,
        query_energy=energy / queries,
        key_covariance=key_covariance / queries,
        key_mean=key_mean / queries,
        value_covariance=value_covariance / queries,
        constant_functional=functional,
        constant_residual=1 - 2 * functional @ mean + functional @ second @ functional,
    )


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@torch.no_grad()
def test_moments_are_those_of_the_model(tiny_llama, bias) -> None:
    model = tiny_llama("gqa", attention_bias=bias)
    moments = collect_moments(source_of(model), BLOCKS, query_stride=1)
    for layer, observed in zip(moments.layers, observe(model), strict=True):
        found = differences(layer, brute_force(observed))
        assert max(found.values()) < 1e-4, found
    assert moments.num_tokens == BLOCKS.numel()


@torch.no_grad()
def test_the_brute_force_sees_each_step(tiny_llama) -> None:
    """Centring, rotation and attention each change the moments by far more than the tolerance."""
    observed = observe(tiny_llama("gqa"))[0]
    reference = brute_force(observed)
    shifted = observed._replace(key=observed.key + 1, plain_key=observed.plain_key + 1)
    changed = differences(brute_force(shifted), reference)
    assert changed.pop("key_mean") > 0.01
    assert max(changed.values()) < 1e-9
    unrotated = differences(brute_force(observed._replace(key=observed.plain_key)), reference)
    assert unrotated["pair_covariance"] > 0.01
    uniform = observed.attention.new_ones(observed.attention.shape).tril()
    even = observed._replace(attention=uniform / uniform.sum(-1, keepdim=True))
    changed = differences(brute_force(even), reference)
    for name in (
        "pair_covariance",
        "key_covariance",
        "key_mean",
        "value_covariance",
        "constant_functional",
    ):
        assert changed[name] > 0.01


def test_the_batch_size_does_not_matter(tiny_llama) -> None:
    source = source_of(tiny_llama("gqa"))
    one, all_at_once = (
        collect_moments(source, BLOCKS, batch_size=size, query_stride=1) for size in (1, 5)
    )
    for left, right in zip(one.layers, all_at_once.layers, strict=True):
        assert max(differences(left, right).values()) < 1e-4


def test_a_stride_samples_the_queries(tiny_llama) -> None:
    """Fewer queries give nearly the same moments, and not the very same."""
    source, blocks = source_of(tiny_llama("gqa")), random_blocks(count=32, length=32)
    every, third = (collect_moments(source, blocks, query_stride=n).layers[0] for n in (1, 3))
    found = differences(third, every)
    assert 1e-6 < found["pair_covariance"] < 0.3
    assert 1e-6 < found["value_covariance"] < 0.3
    assert 1e-6 < found["query_energy"] < 0.3


def test_collecting_leaves_the_model_alone(tiny_llama) -> None:
    model = tiny_llama("gqa")
    expected = model(BLOCKS).logits
    collect_moments(source_of(model), BLOCKS)
    assert torch.equal(model(BLOCKS).logits, expected)
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_every_layer_is_tracked(tiny_llama) -> None:
    seen = []

    def track(items, description):
        for item in items:
            seen.append(description)
            yield item

    collect_moments(source_of(tiny_llama("gqa")), BLOCKS, track=track)
    assert seen == ["calibrating"] * 2


@pytest.fixture
def moments(tiny_llama) -> Moments:
    return collect_moments(source_of(tiny_llama("gqa", num_hidden_layers=3)), BLOCKS)


def test_saving_and_loading(moments, tmp_path) -> None:
    path = tmp_path / "moments.safetensors"
    moments.save(path)
    loaded = Moments.load(path)
    assert (loaded.source_sha256, loaded.num_tokens) == (moments.source_sha256, 5 * 14)
    assert len(loaded.layers) == 3
    for left, right in zip(loaded.layers, moments.layers, strict=True):
        assert left.pair_covariance.dtype == torch.complex128
        assert left.value_covariance.dtype == torch.float64
        assert max(differences(left, right).values()) < 1e-6
    assert [p.name for p in tmp_path.iterdir()] == ["moments.safetensors"]


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no moments file at .*absent"):
        Moments.load(tmp_path / "absent")


def test_a_file_of_another_kind_is_refused(tmp_path) -> None:
    (tmp_path / "text").write_text("not a tensor")
    with pytest.raises(UserError, match="not a readable moments file"):
        Moments.load(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(UserError, match="holds no moments"):
        Moments.load(tmp_path / "weights")


def test_a_file_without_all_moments_is_refused(moments, tmp_path) -> None:
    path: Path = tmp_path / "moments"
    moments.save(path)
    with safe_open(path, framework="pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys() if "key_mean" not in key}  # noqa: SIM118
        save_file(kept, path, metadata=file.metadata())
    with pytest.raises(UserError, match="another version: make a new file"):
        Moments.load(path)


def test_a_truncated_file_is_refused(moments, tmp_path) -> None:
    path: Path = tmp_path / "moments"
    moments.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable moments file"):
        Moments.load(path)


def test_moments_of_another_source_are_refused(tiny_llama) -> None:
    source = source_of(tiny_llama("gqa"))
    moments = collect_moments(source, BLOCKS)
    plan = plan_uniform(source.family.attention_sizes(source.model.config), Budget(kv_floats=16))
    convert_model(source, plan, moments)
    with pytest.raises(UserError, match="made from another source"):
        convert_model(source, plan, replace(moments, source_sha256="f" * 64))
    with pytest.raises(UserError, match="needs calibration moments"):
        convert_model(source, plan, None)
