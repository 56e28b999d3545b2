"""T6's attention layout, checked against eq. 3.1 of the paper written out in complex numbers."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.conversions import convert_tiny
from tpa_convert.errors import UserError
from tpa_convert.export.t6 import export_t6_attention, import_t6_attention
from tpa_convert.modeling import LayerShape, TPAAttention
from tpa_convert.modeling.tpa_llama import TPALlamaConfig, TPALlamaModel

HIDDEN = 20
TOLERANCE = 1e-5


def t6_attention(weights: dict[str, Tensor], hidden: Tensor, heads: int, head_dim: int) -> Tensor:
    """Causal attention of T6 on `hidden` [s, D] in double precision, token by token."""
    weights = {
        name.removeprefix("c_qkv.").removesuffix(".weight"): weight.double()
        for name, weight in weights.items()
    }
    hidden = hidden.double()
    half = head_dim // 2
    angles = torch.tensor([10000 ** (-i / half) for i in range(half)], dtype=torch.float64)

    def rotated(feature: Tensor, position: int) -> Tensor:
        pairs = torch.complex(feature[..., :half], feature[..., half:])
        return pairs * torch.exp(-1j * position * angles)

    def factored(name: str, position: int) -> Tensor:
        head_factor = (weights[f"W_A_{name}"] @ hidden[position]).view(heads, -1)
        feature = (weights[f"W_B_{name}"] @ hidden[position]).view(-1, head_dim)
        if name != "v":
            feature = rotated(feature, position)
        return head_factor.to(feature.dtype) @ feature / len(feature)

    def query(position: int) -> Tensor:
        if "c_q" not in weights:
            return factored("q", position)
        return rotated((weights["c_q"] @ hidden[position]).view(heads, head_dim), position)

    outputs = []
    for position in range(len(hidden)):
        seen = range(position + 1)
        q = query(position)
        keys = torch.stack([factored("k", t) for t in seen])
        values = torch.stack([factored("v", t) for t in seen])
        heads_out = []
        for head in range(heads):
            scores = (keys[:, head] * q[head].conj()).sum(-1).real / math.sqrt(head_dim)
            heads_out.append(scores.softmax(0) @ values[:, head])
        outputs.append(weights["c_proj"] @ torch.cat(heads_out))
    return torch.stack(outputs)


def random_t6_weights(
    heads: int, head_dim: int, rank_q: int | None, rank_k: int, rank_v: int, seed: int = 0
) -> dict[str, Tensor]:
    shapes = {"c_proj.weight": (HIDDEN, heads * head_dim)}
    if rank_q is None:
        shapes["c_qkv.c_q.weight"] = (heads * head_dim, HIDDEN)
    for name, rank in (("q", rank_q), ("k", rank_k), ("v", rank_v)):
        if rank is not None:
            shapes[f"c_qkv.W_A_{name}.weight"] = (heads * rank, HIDDEN)
            shapes[f"c_qkv.W_B_{name}.weight"] = (rank * head_dim, HIDDEN)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        for name, shape in shapes.items()
    }


def imported_attention(
    weights: dict[str, Tensor], heads: int, head_dim: int, rank_q: int | None, **ranks: int
) -> TPAAttention:
    layer = LayerShape(
        "linear",
        "none",
        "none",
        **ranks,
        **{f"width_{name[-1]}": rank * head_dim for name, rank in ranks.items()},
        rank_q=rank_q,
    )
    config = TPALlamaConfig(
        vocab_size=4,
        hidden_size=HIDDEN,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        tpa_layers=asdict(layer),
    )
    config._attn_implementation = "sdpa"
    attention = TPALlamaModel(config).layers[0].self_attn
    attention.load_state_dict(
        import_t6_attention(weights, num_attention_heads=heads, head_dim=head_dim), strict=True
    )
    return attention


def random_hidden(length: int, size: int = HIDDEN) -> Tensor:
    return torch.randn(length, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(attention: TPAAttention, hidden: Tensor) -> Tensor:
    """The layer on `hidden` [s, D]: all tokens but the last at once, then the last one decoded."""
    rotary = LlamaRotaryEmbedding(attention.config)
    cache, outputs = DynamicCache(), []
    last = len(hidden) - 1
    for positions in (torch.arange(last), torch.tensor([last])):
        inputs = hidden[None, positions]
        table = rotary(inputs, positions[None])
        outputs.append(attention(inputs, table, None, past_key_values=cache)[0][0])
    return torch.cat(outputs)


def assert_same_function(attention: TPAAttention, weights: dict[str, Tensor]) -> None:
    config = attention.config
    hidden = random_hidden(7, config.hidden_size)
    expected = t6_attention(weights, hidden, config.num_attention_heads, config.head_dim)
    torch.testing.assert_close(
        run(attention, hidden).double(), expected, atol=TOLERANCE, rtol=TOLERANCE
    )


SHAPES = {
    "heads": st.integers(1, 4),
    "head_dim": st.sampled_from([2, 4, 6, 10]),
    "rank_q": st.none() | st.integers(1, 3),
    "rank_k": st.integers(1, 3),
    "rank_v": st.integers(1, 3),
}


@settings(max_examples=30, deadline=None)
@given(**SHAPES)
def test_imported_weights_compute_what_t6_computes(heads, head_dim, rank_q, rank_k, rank_v) -> None:
    weights = random_t6_weights(heads, head_dim, rank_q, rank_k, rank_v)
    attention = imported_attention(weights, heads, head_dim, rank_q, rank_k=rank_k, rank_v=rank_v)
    assert_same_function(attention, weights)


@settings(max_examples=30, deadline=None)
@given(**SHAPES)
def test_export_undoes_import(heads, head_dim, rank_q, rank_k, rank_v) -> None:
    weights = random_t6_weights(heads, head_dim, rank_q, rank_k, rank_v)
    attention = imported_attention(weights, heads, head_dim, rank_q, rank_k=rank_k, rank_v=rank_v)
    exported = export_t6_attention(attention)
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(exported[name], weight), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_import_keeps_dtypes_and_needs_no_output_projection(dtype) -> None:
    weights = {k: v.to(dtype) for k, v in random_t6_weights(3, 4, 2, 2, 1).items()}
    del weights["c_proj.weight"]
    imported = import_t6_attention(weights, num_attention_heads=3, head_dim=4)
    assert "o_proj.weight" not in imported
    assert {tensor.dtype for tensor in imported.values()} == {dtype}


def linear_attention(model) -> TPAAttention:
    return model.model.layers[1].self_attn


@pytest.mark.parametrize("shape", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("rank_q", [None, 3])
def test_export_of_a_converted_layer_computes_the_same(tiny_llama, shape, rank_q) -> None:
    """A has one row for every query head of T6, so a GQA layer repeats its own."""
    rank_k = 1 if shape == "mqa" else 2
    attention = linear_attention(
        convert_tiny(
            tiny_llama(shape),
            form="linear",
            method="svd",
            rank_k=rank_k,
            rank_v=1,
            rank_q=rank_q,
        )
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in attention.parameters():  # converted head factors are all proportional
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    weights = export_t6_attention(attention)
    assert len(weights["c_qkv.W_A_k.weight"]) == 4 * rank_k
    assert ("c_qkv.c_q.weight" in weights) == (rank_q is None)
    assert_same_function(attention, weights)


@pytest.mark.parametrize("rank_q", [None, 2])
def test_another_attention_scale_goes_into_the_queries(rank_q) -> None:
    weights = random_t6_weights(2, 4, rank_q, 2, 1)
    attention = imported_attention(weights, 2, 4, rank_q, rank_k=2, rank_v=1)
    attention.scaling = 1.7
    assert_same_function(attention, export_t6_attention(attention))


def test_another_rope_base_is_said(tiny_llama) -> None:
    source = tiny_llama("gqa", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    model = convert_tiny(source, form="linear", method="svd", rank_k=1, rank_v=1)
    with pytest.warns(UserWarning, match="base=500"):
        export_t6_attention(linear_attention(model))


LINEAR = {"form": "linear", "method": "svd", "rank_k": 1, "rank_v": 1}
SCALED = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("source", "conversion", "reason"),
    [
        ({}, {"form": "static"}, "constant"),
        ({}, LINEAR | {"form": "affine"}, "affine head factors have a bias"),
        ({}, {"form": "linear", "gauge": "applied", "kv_floats": 20}, r"gauge \(applied\)"),
        ({"attention_bias": True}, LINEAR, "biases"),
        ({"rope_parameters": SCALED}, LINEAR, r"RoPE is scaled \(linear\)"),
    ],
)
def test_layers_that_t6_cannot_hold_are_refused(tiny_llama, source, conversion, reason) -> None:
    model = convert_tiny(tiny_llama("gqa", **source), **conversion)
    with pytest.raises(UserError, match=f"layer 1 has no T6 layout: .*{reason}"):
        export_t6_attention(linear_attention(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c_qkv.W_B_v.weight": None}, r"missing: c_qkv\.W_B_v\.weight; unknown: none"),
        ({"subln.weight": torch.ones(4)}, r"unknown: subln\.weight"),
        ({"c_qkv.W_A_q.bias": torch.ones(6)}, r"unknown: c_qkv\.W_A_q\.bias"),
        ({"c_qkv.W_A_k.weight": torch.ones(5, HIDDEN)}, r"W_A_k\.weight has shape \(5, 20\)"),
        ({"c_qkv.W_B_q.weight": torch.ones(7, HIDDEN)}, r"W_[AB]_q\.weight has shape"),
        ({"c_proj.weight": torch.ones(HIDDEN, 8)}, r"c_proj\.weight has shape .* not \(20, 12\)"),
    ],
)
def test_weights_of_something_else_are_refused(changes, message) -> None:
    weights = random_t6_weights(3, 4, 2, 2, 1) | changes
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    with pytest.raises(UserError, match=message):
        import_t6_attention(weights, num_attention_heads=3, head_dim=4)
