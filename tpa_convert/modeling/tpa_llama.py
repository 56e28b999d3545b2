"""Llama with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPALlamaConfig(TPAConfigMixin, LlamaConfig):
    """[`LlamaConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_llama"
    tpa_layers: list | dict | None = None


class TPALlamaModel(TPAModelMixin, LlamaModel):
    """The decoder without its language-model head."""

    config: TPALlamaConfig

    def __init__(self, config: TPALlamaConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPALlamaForCausalLM(TPAModelMixin, LlamaForCausalLM):
    """The decoder with its language-model head."""

    config: TPALlamaConfig
    decoder_class = TPALlamaModel

    def __init__(self, config: TPALlamaConfig):
        super().__init__(config)
        self.model = TPALlamaModel(config)
        self.post_init()


__all__ = ["TPALlamaConfig", "TPALlamaForCausalLM", "TPALlamaModel"]
