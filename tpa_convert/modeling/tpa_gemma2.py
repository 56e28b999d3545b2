"""Gemma2 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAGemma2Config(TPAConfigMixin, Gemma2Config):
    """[`Gemma2Config`] with the shapes of the TPA layers."""

    model_type = "tpa_gemma2"
    tpa_layers: list | dict | None = None


class TPAGemma2Model(TPAModelMixin, Gemma2Model):
    """The decoder without its language-model head."""

    config: TPAGemma2Config

    def __init__(self, config: TPAGemma2Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAGemma2ForCausalLM(TPAModelMixin, Gemma2ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAGemma2Config
    decoder_class = TPAGemma2Model

    def __init__(self, config: TPAGemma2Config):
        super().__init__(config)
        self.model = TPAGemma2Model(config)
        self.post_init()


__all__ = ["TPAGemma2Config", "TPAGemma2ForCausalLM", "TPAGemma2Model"]
