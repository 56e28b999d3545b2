"""Starcoder2 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Starcoder2Config, Starcoder2ForCausalLM, Starcoder2Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAStarcoder2Config(TPAConfigMixin, Starcoder2Config):
    """[`Starcoder2Config`] with the shapes of the TPA layers."""

    model_type = "tpa_starcoder2"
    tpa_layers: list | dict | None = None


class TPAStarcoder2Model(TPAModelMixin, Starcoder2Model):
    """The decoder without its language-model head."""

    config: TPAStarcoder2Config

    def __init__(self, config: TPAStarcoder2Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAStarcoder2ForCausalLM(TPAModelMixin, Starcoder2ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAStarcoder2Config
    decoder_class = TPAStarcoder2Model

    def __init__(self, config: TPAStarcoder2Config):
        super().__init__(config)
        self.model = TPAStarcoder2Model(config)
        self.post_init()


__all__ = ["TPAStarcoder2Config", "TPAStarcoder2ForCausalLM", "TPAStarcoder2Model"]
