"""Olmoe with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import OlmoeConfig, OlmoeForCausalLM, OlmoeModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAOlmoeConfig(TPAConfigMixin, OlmoeConfig):
    """[`OlmoeConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_olmoe"
    tpa_layers: list | dict | None = None


class TPAOlmoeModel(TPAModelMixin, OlmoeModel):
    """The decoder without its language-model head."""

    config: TPAOlmoeConfig

    def __init__(self, config: TPAOlmoeConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAOlmoeForCausalLM(TPAModelMixin, OlmoeForCausalLM):
    """The decoder with its language-model head."""

    config: TPAOlmoeConfig
    decoder_class = TPAOlmoeModel

    def __init__(self, config: TPAOlmoeConfig):
        super().__init__(config)
        self.model = TPAOlmoeModel(config)
        self.post_init()


__all__ = ["TPAOlmoeConfig", "TPAOlmoeForCausalLM", "TPAOlmoeModel"]
