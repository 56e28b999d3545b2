"""StableLm with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import StableLmConfig, StableLmForCausalLM, StableLmModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAStableLmConfig(TPAConfigMixin, StableLmConfig):
    """[`StableLmConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_stablelm"
    tpa_layers: list | dict | None = None


class TPAStableLmModel(TPAModelMixin, StableLmModel):
    """The decoder without its language-model head."""

    config: TPAStableLmConfig

    def __init__(self, config: TPAStableLmConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAStableLmForCausalLM(TPAModelMixin, StableLmForCausalLM):
    """The decoder with its language-model head."""

    config: TPAStableLmConfig
    decoder_class = TPAStableLmModel

    def __init__(self, config: TPAStableLmConfig):
        super().__init__(config)
        self.model = TPAStableLmModel(config)
        self.post_init()


__all__ = ["TPAStableLmConfig", "TPAStableLmForCausalLM", "TPAStableLmModel"]
