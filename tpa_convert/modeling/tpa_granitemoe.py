"""GraniteMoe with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, GraniteMoeModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAGraniteMoeConfig(TPAConfigMixin, GraniteMoeConfig):
    """[`GraniteMoeConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_granitemoe"
    tpa_layers: list | dict | None = None


class TPAGraniteMoeModel(TPAModelMixin, GraniteMoeModel):
    """The decoder without its language-model head."""

    config: TPAGraniteMoeConfig

    def __init__(self, config: TPAGraniteMoeConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAGraniteMoeForCausalLM(TPAModelMixin, GraniteMoeForCausalLM):
    """The decoder with its language-model head."""

    config: TPAGraniteMoeConfig
    decoder_class = TPAGraniteMoeModel

    def __init__(self, config: TPAGraniteMoeConfig):
        super().__init__(config)
        self.model = TPAGraniteMoeModel(config)
        self.post_init()


__all__ = ["TPAGraniteMoeConfig", "TPAGraniteMoeForCausalLM", "TPAGraniteMoeModel"]
