"""The plugin of vLLM: converted models with a cache of their size.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its
processes. It knows two things by it: how large the heads of each layer are, and which class runs
the model. Only vLLM imports this module.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm import ModelRegistry
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from tpa_convert.engines.one_head import head_size, obstacle
from tpa_convert.families import experts_of
from tpa_convert.modeling import CAUSAL_LMS, LayerShape, source_key_value_heads

MODELS = "tpa_convert.engines.vllm_models"


def register() -> None:
    """Makes converted models known to vLLM; may be called again."""
    causal_lms: list[Any] = list(CAUSAL_LMS.values())
    for causal_lm in causal_lms:
        config = causal_lm.config_class
        kind = "TPAMoEForCausalLM" if experts_of(config()) else "TPAForCausalLM"
        MODEL_ARCH_CONFIG_CONVERTORS[config.model_type] = TPAArchitecture
        if causal_lm.__name__ not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(causal_lm.__name__, f"{MODELS}:{kind}")


def size_of(shape: LayerShape) -> int:
    """Size of the one head that a layer has in vLLM."""
    if not current_platform.is_cpu():
        return head_size(shape, None)  # FlashAttention takes multiples of 8
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return head_size(shape, CPUAttentionBackend.get_supported_head_sizes())


class TPAArchitecture(ModelArchConfigConvertorBase):
    """What vLLM allots for a converted model: one key-value head a layer."""

    def get_per_layer_hf_configs(self) -> list[tuple[Any, Any]] | None:
        """A config of one layer for each; None if all layers are as large.

        Raises:
            ValueError: a layer that vLLM has no cache for.
        """
        layers = self.hf_config.tpa_layers
        shapes = [LayerShape(**layer) for layer in layers]
        for i, shape in enumerate(shapes):
            if reason := obstacle(shape, source_key_value_heads(self.hf_config)):
                raise ValueError(f"vLLM cannot cache layer {i} of this model: {reason}")
        if len({size_of(shape) for shape in shapes}) == 1:
            return None
        configs = []
        for layer in layers:
            config = copy.copy(self.hf_config)
            config.tpa_layers = [layer]
            configs.append((config, config))
        return configs

    def get_head_size(self) -> int:
        return size_of(LayerShape(**self.hf_config.tpa_layers[0]))

    def get_total_num_kv_heads(self) -> int:
        return 1
