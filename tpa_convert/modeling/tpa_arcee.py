"""Arcee with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import ArceeConfig, ArceeForCausalLM, ArceeModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAArceeConfig(TPAConfigMixin, ArceeConfig):
    """[`ArceeConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_arcee"
    tpa_layers: list | dict | None = None


class TPAArceeModel(TPAModelMixin, ArceeModel):
    """The decoder without its language-model head."""

    config: TPAArceeConfig

    def __init__(self, config: TPAArceeConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAArceeForCausalLM(TPAModelMixin, ArceeForCausalLM):
    """The decoder with its language-model head."""

    config: TPAArceeConfig
    decoder_class = TPAArceeModel

    def __init__(self, config: TPAArceeConfig):
        super().__init__(config)
        self.model = TPAArceeModel(config)
        self.post_init()


__all__ = ["TPAArceeConfig", "TPAArceeForCausalLM", "TPAArceeModel"]
