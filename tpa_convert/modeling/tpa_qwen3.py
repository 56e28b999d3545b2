"""Qwen3 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAQwen3Config(TPAConfigMixin, Qwen3Config):
    """[`Qwen3Config`] with the shapes of the TPA layers."""

    model_type = "tpa_qwen3"
    tpa_layers: list | dict | None = None


class TPAQwen3Model(TPAModelMixin, Qwen3Model):
    """The decoder without its language-model head."""

    config: TPAQwen3Config

    def __init__(self, config: TPAQwen3Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAQwen3ForCausalLM(TPAModelMixin, Qwen3ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAQwen3Config
    decoder_class = TPAQwen3Model

    def __init__(self, config: TPAQwen3Config):
        super().__init__(config)
        self.model = TPAQwen3Model(config)
        self.post_init()


__all__ = ["TPAQwen3Config", "TPAQwen3ForCausalLM", "TPAQwen3Model"]
