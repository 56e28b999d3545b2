"""Ministral with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import MinistralConfig, MinistralForCausalLM, MinistralModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAMinistralConfig(TPAConfigMixin, MinistralConfig):
    """[`MinistralConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_ministral"
    tpa_layers: list | dict | None = None


class TPAMinistralModel(TPAModelMixin, MinistralModel):
    """The decoder without its language-model head."""

    config: TPAMinistralConfig

    def __init__(self, config: TPAMinistralConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAMinistralForCausalLM(TPAModelMixin, MinistralForCausalLM):
    """The decoder with its language-model head."""

    config: TPAMinistralConfig
    decoder_class = TPAMinistralModel

    def __init__(self, config: TPAMinistralConfig):
        super().__init__(config)
        self.model = TPAMinistralModel(config)
        self.post_init()


__all__ = ["TPAMinistralConfig", "TPAMinistralForCausalLM", "TPAMinistralModel"]
