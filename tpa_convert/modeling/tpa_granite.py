"""Granite with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import GraniteConfig, GraniteForCausalLM, GraniteModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAGraniteConfig(TPAConfigMixin, GraniteConfig):
    """[`GraniteConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_granite"
    tpa_layers: list | dict | None = None


class TPAGraniteModel(TPAModelMixin, GraniteModel):
    """The decoder without its language-model head."""

    config: TPAGraniteConfig

    def __init__(self, config: TPAGraniteConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAGraniteForCausalLM(TPAModelMixin, GraniteForCausalLM):
    """The decoder with its language-model head."""

    config: TPAGraniteConfig
    decoder_class = TPAGraniteModel

    def __init__(self, config: TPAGraniteConfig):
        super().__init__(config)
        self.model = TPAGraniteModel(config)
        self.post_init()


__all__ = ["TPAGraniteConfig", "TPAGraniteForCausalLM", "TPAGraniteModel"]
