"""Phimoe with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import PhimoeConfig, PhimoeForCausalLM, PhimoeModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAPhimoeConfig(TPAConfigMixin, PhimoeConfig):
    """[`PhimoeConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_phimoe"
    tpa_layers: list | dict | None = None


class TPAPhimoeModel(TPAModelMixin, PhimoeModel):
    """The decoder without its language-model head."""

    config: TPAPhimoeConfig

    def __init__(self, config: TPAPhimoeConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAPhimoeForCausalLM(TPAModelMixin, PhimoeForCausalLM):
    """The decoder with its language-model head."""

    config: TPAPhimoeConfig
    decoder_class = TPAPhimoeModel

    def __init__(self, config: TPAPhimoeConfig):
        super().__init__(config)
        self.model = TPAPhimoeModel(config)
        self.post_init()


__all__ = ["TPAPhimoeConfig", "TPAPhimoeForCausalLM", "TPAPhimoeModel"]
