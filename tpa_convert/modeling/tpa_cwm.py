"""Cwm with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import CwmConfig, CwmForCausalLM, CwmModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPACwmConfig(TPAConfigMixin, CwmConfig):
    """[`CwmConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_cwm"
    tpa_layers: list | dict | None = None


class TPACwmModel(TPAModelMixin, CwmModel):
    """The decoder without its language-model head."""

    config: TPACwmConfig

    def __init__(self, config: TPACwmConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPACwmForCausalLM(TPAModelMixin, CwmForCausalLM):
    """The decoder with its language-model head."""

    config: TPACwmConfig
    decoder_class = TPACwmModel

    def __init__(self, config: TPACwmConfig):
        super().__init__(config)
        self.model = TPACwmModel(config)
        self.post_init()


__all__ = ["TPACwmConfig", "TPACwmForCausalLM", "TPACwmModel"]
