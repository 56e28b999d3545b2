"""Olmo3 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Olmo3Config, Olmo3ForCausalLM, Olmo3Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAOlmo3Config(TPAConfigMixin, Olmo3Config):
    """[`Olmo3Config`] with the shapes of the TPA layers."""

    model_type = "tpa_olmo3"
    tpa_layers: list | dict | None = None


class TPAOlmo3Model(TPAModelMixin, Olmo3Model):
    """The decoder without its language-model head."""

    config: TPAOlmo3Config

    def __init__(self, config: TPAOlmo3Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAOlmo3ForCausalLM(TPAModelMixin, Olmo3ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAOlmo3Config
    decoder_class = TPAOlmo3Model

    def __init__(self, config: TPAOlmo3Config):
        super().__init__(config)
        self.model = TPAOlmo3Model(config)
        self.post_init()


__all__ = ["TPAOlmo3Config", "TPAOlmo3ForCausalLM", "TPAOlmo3Model"]
