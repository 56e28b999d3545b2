"""Converted models inside vLLM: its backend for models of transformers, with our attention."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from vllm.model_executor.models.transformers import (
    TransformersForCausalLM,
    TransformersMoEForCausalLM,
)

from tpa_convert.engines.one_head import absorb_gauges, absorbed, use_one_head
from tpa_convert.engines.vllm import size_of
from tpa_convert.modeling import source_head_dim, source_key_value_heads


class OneHeadMixin:
    """Has vLLM cache the components of every layer as one head."""

    config: Any
    text_config: Any
    model: Any

    def _patch_config(self) -> None:
        if self.parallel_config.tensor_parallel_size > 1:  # type: ignore[attr-defined]
            raise ValueError(
                "all heads of a converted model share one head of the cache, which cannot be "
                "split: leave out --tensor-parallel-size"
            )
        self.saved_config = self.config
        self.config = self.text_config = copy.copy(self.config)
        self.config.tpa_layers = [asdict(absorbed(s)) for s in self.saved_config.layer_shapes]
        super()._patch_config()  # type: ignore[misc]

    def recursive_replace(self) -> None:
        use_one_head(self.model, size_of)
        super().recursive_replace()  # type: ignore[misc]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        config = self.saved_config
        merged = absorb_gauges(
            weights,
            config,
            type(self.model).attention_names,
            source_head_dim(config),
            source_key_value_heads(config),
        )
        return super().load_weights(merged)  # type: ignore[misc]


class TPAForCausalLM(OneHeadMixin, TransformersForCausalLM):
    """Any converted model without experts."""


class TPAMoEForCausalLM(OneHeadMixin, TransformersMoEForCausalLM):
    """Any converted model with experts."""
