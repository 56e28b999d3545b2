"""Gemma with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import GemmaConfig, GemmaForCausalLM, GemmaModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAGemmaConfig(TPAConfigMixin, GemmaConfig):
    """[`GemmaConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_gemma"
    tpa_layers: list | dict | None = None


class TPAGemmaModel(TPAModelMixin, GemmaModel):
    """The decoder without its language-model head."""

    config: TPAGemmaConfig

    def __init__(self, config: TPAGemmaConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAGemmaForCausalLM(TPAModelMixin, GemmaForCausalLM):
    """The decoder with its language-model head."""

    config: TPAGemmaConfig
    decoder_class = TPAGemmaModel

    def __init__(self, config: TPAGemmaConfig):
        super().__init__(config)
        self.model = TPAGemmaModel(config)
        self.post_init()


__all__ = ["TPAGemmaConfig", "TPAGemmaForCausalLM", "TPAGemmaModel"]
