"""Gemma3 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAGemma3Config(TPAConfigMixin, Gemma3TextConfig):
    """[`Gemma3TextConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_gemma3_text"
    tpa_layers: list | dict | None = None


class TPAGemma3Model(TPAModelMixin, Gemma3TextModel):
    """The decoder without its language-model head."""

    config: TPAGemma3Config

    def __init__(self, config: TPAGemma3Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAGemma3ForCausalLM(TPAModelMixin, Gemma3ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAGemma3Config
    decoder_class = TPAGemma3Model

    def __init__(self, config: TPAGemma3Config):
        super().__init__(config)
        self.model = TPAGemma3Model(config)
        self.post_init()


__all__ = ["TPAGemma3Config", "TPAGemma3ForCausalLM", "TPAGemma3Model"]
