"""Qwen2Moe with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen2MoeModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAQwen2MoeConfig(TPAConfigMixin, Qwen2MoeConfig):
    """[`Qwen2MoeConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_qwen2_moe"
    tpa_layers: list | dict | None = None


class TPAQwen2MoeModel(TPAModelMixin, Qwen2MoeModel):
    """The decoder without its language-model head."""

    config: TPAQwen2MoeConfig

    def __init__(self, config: TPAQwen2MoeConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAQwen2MoeForCausalLM(TPAModelMixin, Qwen2MoeForCausalLM):
    """The decoder with its language-model head."""

    config: TPAQwen2MoeConfig
    decoder_class = TPAQwen2MoeModel

    def __init__(self, config: TPAQwen2MoeConfig):
        super().__init__(config)
        self.model = TPAQwen2MoeModel(config)
        self.post_init()


__all__ = ["TPAQwen2MoeConfig", "TPAQwen2MoeForCausalLM", "TPAQwen2MoeModel"]
