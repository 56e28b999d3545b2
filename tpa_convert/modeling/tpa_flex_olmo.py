"""FlexOlmo with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import FlexOlmoConfig, FlexOlmoForCausalLM, FlexOlmoModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAFlexOlmoConfig(TPAConfigMixin, FlexOlmoConfig):
    """[`FlexOlmoConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_flex_olmo"
    tpa_layers: list | dict | None = None


class TPAFlexOlmoModel(TPAModelMixin, FlexOlmoModel):
    """The decoder without its language-model head."""

    config: TPAFlexOlmoConfig

    def __init__(self, config: TPAFlexOlmoConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAFlexOlmoForCausalLM(TPAModelMixin, FlexOlmoForCausalLM):
    """The decoder with its language-model head."""

    config: TPAFlexOlmoConfig
    decoder_class = TPAFlexOlmoModel

    def __init__(self, config: TPAFlexOlmoConfig):
        super().__init__(config)
        self.model = TPAFlexOlmoModel(config)
        self.post_init()


__all__ = ["TPAFlexOlmoConfig", "TPAFlexOlmoForCausalLM", "TPAFlexOlmoModel"]
