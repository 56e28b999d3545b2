"""Mixtral with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAMixtralConfig(TPAConfigMixin, MixtralConfig):
    """[`MixtralConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_mixtral"
    tpa_layers: list | dict | None = None


class TPAMixtralModel(TPAModelMixin, MixtralModel):
    """The decoder without its language-model head."""

    config: TPAMixtralConfig

    def __init__(self, config: TPAMixtralConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAMixtralForCausalLM(TPAModelMixin, MixtralForCausalLM):
    """The decoder with its language-model head."""

    config: TPAMixtralConfig
    decoder_class = TPAMixtralModel

    def __init__(self, config: TPAMixtralConfig):
        super().__init__(config)
        self.model = TPAMixtralModel(config)
        self.post_init()


__all__ = ["TPAMixtralConfig", "TPAMixtralForCausalLM", "TPAMixtralModel"]
