"""Glm4Moe with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, Glm4MoeModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAGlm4MoeConfig(TPAConfigMixin, Glm4MoeConfig):
    """[`Glm4MoeConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_glm4_moe"
    tpa_layers: list | dict | None = None


class TPAGlm4MoeModel(TPAModelMixin, Glm4MoeModel):
    """The decoder without its language-model head."""

    config: TPAGlm4MoeConfig

    def __init__(self, config: TPAGlm4MoeConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAGlm4MoeForCausalLM(TPAModelMixin, Glm4MoeForCausalLM):
    """The decoder with its language-model head."""

    config: TPAGlm4MoeConfig
    decoder_class = TPAGlm4MoeModel

    def __init__(self, config: TPAGlm4MoeConfig):
        super().__init__(config)
        self.model = TPAGlm4MoeModel(config)
        self.post_init()


__all__ = ["TPAGlm4MoeConfig", "TPAGlm4MoeForCausalLM", "TPAGlm4MoeModel"]
