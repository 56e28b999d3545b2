"""SolarOpen with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import SolarOpenConfig, SolarOpenForCausalLM, SolarOpenModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPASolarOpenConfig(TPAConfigMixin, SolarOpenConfig):
    """[`SolarOpenConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_solar_open"
    tpa_layers: list | dict | None = None


class TPASolarOpenModel(TPAModelMixin, SolarOpenModel):
    """The decoder without its language-model head."""

    config: TPASolarOpenConfig

    def __init__(self, config: TPASolarOpenConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPASolarOpenForCausalLM(TPAModelMixin, SolarOpenForCausalLM):
    """The decoder with its language-model head."""

    config: TPASolarOpenConfig
    decoder_class = TPASolarOpenModel

    def __init__(self, config: TPASolarOpenConfig):
        super().__init__(config)
        self.model = TPASolarOpenModel(config)
        self.post_init()


__all__ = ["TPASolarOpenConfig", "TPASolarOpenForCausalLM", "TPASolarOpenModel"]
