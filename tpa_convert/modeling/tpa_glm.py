"""Glm with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import GlmConfig, GlmForCausalLM, GlmModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin
from .tpa_source import AttentionNames


class TPAGlmConfig(TPAConfigMixin, GlmConfig):
    """[`GlmConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_glm"
    tpa_layers: list | dict | None = None


class TPAGlmModel(TPAModelMixin, GlmModel):
    """The decoder without its language-model head."""

    config: TPAGlmConfig
    attention_names = AttentionNames(pairs="neighbours")

    def __init__(self, config: TPAGlmConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAGlmForCausalLM(TPAModelMixin, GlmForCausalLM):
    """The decoder with its language-model head."""

    config: TPAGlmConfig
    decoder_class = TPAGlmModel

    def __init__(self, config: TPAGlmConfig):
        super().__init__(config)
        self.model = TPAGlmModel(config)
        self.post_init()


__all__ = ["TPAGlmConfig", "TPAGlmForCausalLM", "TPAGlmModel"]
