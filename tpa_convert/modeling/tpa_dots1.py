"""Dots1 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Dots1Config, Dots1ForCausalLM, Dots1Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPADots1Config(TPAConfigMixin, Dots1Config):
    """[`Dots1Config`] with the shapes of the TPA layers."""

    model_type = "tpa_dots1"
    tpa_layers: list | dict | None = None


class TPADots1Model(TPAModelMixin, Dots1Model):
    """The decoder without its language-model head."""

    config: TPADots1Config

    def __init__(self, config: TPADots1Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPADots1ForCausalLM(TPAModelMixin, Dots1ForCausalLM):
    """The decoder with its language-model head."""

    config: TPADots1Config
    decoder_class = TPADots1Model

    def __init__(self, config: TPADots1Config):
        super().__init__(config)
        self.model = TPADots1Model(config)
        self.post_init()


__all__ = ["TPADots1Config", "TPADots1ForCausalLM", "TPADots1Model"]
