"""Helpers shared by the tests that convert tiny models."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from tests.conftest import make_tiny_llama
from tpa_convert.calibration.moments import Moments, collect_moments
from tpa_convert.conversion.model import convert_model
from tpa_convert.families import family_of
from tpa_convert.modeling import Form, Gauge, KeyCache, LayerShape
from tpa_convert.modeling.tpa_llama import TPALlamaConfig, TPALlamaForCausalLM
from tpa_convert.plans import Budget, plan_uniform
from tpa_convert.sources import Source, SourceReference


def source_of(model: PreTrainedModel) -> Source:
    """A `Source` around a model in memory."""
    reference = SourceReference(id="tiny", revision=None, sha256="0" * 64, gguf_file=None)
    return Source(model, None, family_of(model.config), reference)  # type: ignore[arg-type]


def random_blocks(vocab_size: int = 128, count: int = 8, length: int = 48, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (count, length), generator=generator)


def tiny_moments(model: PreTrainedModel) -> Moments:
    return collect_moments(source_of(model), random_blocks())


def convert_tiny(
    model: PreTrainedModel,
    *,
    method: str = "gauge",
    whiten: bool = True,
    form: Form = "static",
    gauge: Gauge | Literal["auto"] = "auto",
    rank_q: int | None = None,
    key_cache: KeyCache = "rotated",
    moments: Moments | None = None,
    **budget: Any,
) -> PreTrainedModel:
    """Converts a tiny model; `budget` is what `Budget` takes, the full width by default."""
    source = source_of(model)
    sizes = source.family.attention_sizes(model.config)
    if not budget:
        heads, head_dim = sizes["num_key_value_heads"], sizes["head_dim"]
        budget = {"width_k": heads * head_dim, "width_v": heads * head_dim}
        if method == "svd" and form != "static":
            budget = {"rank_k": heads, "rank_v": heads}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plan = plan_uniform(
            sizes,
            Budget(**budget),
            form=form,
            gauge=gauge,
            whole_heads=method == "svd",
            rank_q=rank_q,
            key_cache=key_cache,
        )
    moments = moments or tiny_moments(model)
    return convert_model(source, plan, moments, method=method, whiten=whiten)


def random_coded() -> PreTrainedModel:
    """A random model whose cache is rows of bytes."""
    shape = LayerShape(
        form="static",
        key_gauge="applied",
        value_gauge="applied",
        rank_k=1,
        rank_v=1,
        width_k=16,
        width_v=16,
        key_cache="latent",
        key_codes="4x8 2x8",
        value_codes="8x3 4x5 2x8",
    )
    config = TPALlamaConfig(
        **make_tiny_llama("gqa", initializer_range=0.3).config.to_dict()
        | {"model_type": "tpa_llama", "architectures": None},
        tpa_layers=asdict(shape),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TPALlamaForCausalLM(config).eval().requires_grad_(False)
