"""Apertus with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import ApertusConfig, ApertusForCausalLM, ApertusModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAApertusConfig(TPAConfigMixin, ApertusConfig):
    """[`ApertusConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_apertus"
    tpa_layers: list | dict | None = None


class TPAApertusModel(TPAModelMixin, ApertusModel):
    """The decoder without its language-model head."""

    config: TPAApertusConfig

    def __init__(self, config: TPAApertusConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAApertusForCausalLM(TPAModelMixin, ApertusForCausalLM):
    """The decoder with its language-model head."""

    config: TPAApertusConfig
    decoder_class = TPAApertusModel

    def __init__(self, config: TPAApertusConfig):
        super().__init__(config)
        self.model = TPAApertusModel(config)
        self.post_init()


__all__ = ["TPAApertusConfig", "TPAApertusForCausalLM", "TPAApertusModel"]
