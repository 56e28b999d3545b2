"""Qwen2 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAQwen2Config(TPAConfigMixin, Qwen2Config):
    """[`Qwen2Config`] with the shapes of the TPA layers."""

    model_type = "tpa_qwen2"
    tpa_layers: list | dict | None = None


class TPAQwen2Model(TPAModelMixin, Qwen2Model):
    """The decoder without its language-model head."""

    config: TPAQwen2Config

    def __init__(self, config: TPAQwen2Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAQwen2ForCausalLM(TPAModelMixin, Qwen2ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAQwen2Config
    decoder_class = TPAQwen2Model

    def __init__(self, config: TPAQwen2Config):
        super().__init__(config)
        self.model = TPAQwen2Model(config)
        self.post_init()


__all__ = ["TPAQwen2Config", "TPAQwen2ForCausalLM", "TPAQwen2Model"]
