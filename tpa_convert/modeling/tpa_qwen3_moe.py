"""Qwen3Moe with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAQwen3MoeConfig(TPAConfigMixin, Qwen3MoeConfig):
    """[`Qwen3MoeConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_qwen3_moe"
    tpa_layers: list | dict | None = None


class TPAQwen3MoeModel(TPAModelMixin, Qwen3MoeModel):
    """The decoder without its language-model head."""

    config: TPAQwen3MoeConfig

    def __init__(self, config: TPAQwen3MoeConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAQwen3MoeForCausalLM(TPAModelMixin, Qwen3MoeForCausalLM):
    """The decoder with its language-model head."""

    config: TPAQwen3MoeConfig
    decoder_class = TPAQwen3MoeModel

    def __init__(self, config: TPAQwen3MoeConfig):
        super().__init__(config)
        self.model = TPAQwen3MoeModel(config)
        self.post_init()


__all__ = ["TPAQwen3MoeConfig", "TPAQwen3MoeForCausalLM", "TPAQwen3MoeModel"]
