"""Olmo with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import OlmoConfig, OlmoForCausalLM, OlmoModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAOlmoConfig(TPAConfigMixin, OlmoConfig):
    """[`OlmoConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_olmo"
    tpa_layers: list | dict | None = None


class TPAOlmoModel(TPAModelMixin, OlmoModel):
    """The decoder without its language-model head."""

    config: TPAOlmoConfig

    def __init__(self, config: TPAOlmoConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAOlmoForCausalLM(TPAModelMixin, OlmoForCausalLM):
    """The decoder with its language-model head."""

    config: TPAOlmoConfig
    decoder_class = TPAOlmoModel

    def __init__(self, config: TPAOlmoConfig):
        super().__init__(config)
        self.model = TPAOlmoModel(config)
        self.post_init()


__all__ = ["TPAOlmoConfig", "TPAOlmoForCausalLM", "TPAOlmoModel"]
