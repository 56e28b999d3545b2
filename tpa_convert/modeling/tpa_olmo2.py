"""Olmo2 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAOlmo2Config(TPAConfigMixin, Olmo2Config):
    """[`Olmo2Config`] with the shapes of the TPA layers."""

    model_type = "tpa_olmo2"
    tpa_layers: list | dict | None = None


class TPAOlmo2Model(TPAModelMixin, Olmo2Model):
    """The decoder without its language-model head."""

    config: TPAOlmo2Config

    def __init__(self, config: TPAOlmo2Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAOlmo2ForCausalLM(TPAModelMixin, Olmo2ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAOlmo2Config
    decoder_class = TPAOlmo2Model

    def __init__(self, config: TPAOlmo2Config):
        super().__init__(config)
        self.model = TPAOlmo2Model(config)
        self.post_init()


__all__ = ["TPAOlmo2Config", "TPAOlmo2ForCausalLM", "TPAOlmo2Model"]
