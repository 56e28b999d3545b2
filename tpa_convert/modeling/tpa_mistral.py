"""Mistral with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import MistralConfig, MistralForCausalLM, MistralModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAMistralConfig(TPAConfigMixin, MistralConfig):
    """[`MistralConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_mistral"
    tpa_layers: list | dict | None = None


class TPAMistralModel(TPAModelMixin, MistralModel):
    """The decoder without its language-model head."""

    config: TPAMistralConfig

    def __init__(self, config: TPAMistralConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAMistralForCausalLM(TPAModelMixin, MistralForCausalLM):
    """The decoder with its language-model head."""

    config: TPAMistralConfig
    decoder_class = TPAMistralModel

    def __init__(self, config: TPAMistralConfig):
        super().__init__(config)
        self.model = TPAMistralModel(config)
        self.post_init()


__all__ = ["TPAMistralConfig", "TPAMistralForCausalLM", "TPAMistralModel"]
