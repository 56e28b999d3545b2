"""Glm4 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Glm4Config, Glm4ForCausalLM, Glm4Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin
from .tpa_source import AttentionNames


class TPAGlm4Config(TPAConfigMixin, Glm4Config):
    """[`Glm4Config`] with the shapes of the TPA layers."""

    model_type = "tpa_glm4"
    tpa_layers: list | dict | None = None


class TPAGlm4Model(TPAModelMixin, Glm4Model):
    """The decoder without its language-model head."""

    config: TPAGlm4Config
    attention_names = AttentionNames(pairs="neighbours")

    def __init__(self, config: TPAGlm4Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAGlm4ForCausalLM(TPAModelMixin, Glm4ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAGlm4Config
    decoder_class = TPAGlm4Model

    def __init__(self, config: TPAGlm4Config):
        super().__init__(config)
        self.model = TPAGlm4Model(config)
        self.post_init()


__all__ = ["TPAGlm4Config", "TPAGlm4ForCausalLM", "TPAGlm4Model"]
