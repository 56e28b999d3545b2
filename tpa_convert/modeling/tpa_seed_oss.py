"""SeedOss with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import SeedOssConfig, SeedOssForCausalLM, SeedOssModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPASeedOssConfig(TPAConfigMixin, SeedOssConfig):
    """[`SeedOssConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_seed_oss"
    tpa_layers: list | dict | None = None


class TPASeedOssModel(TPAModelMixin, SeedOssModel):
    """The decoder without its language-model head."""

    config: TPASeedOssConfig

    def __init__(self, config: TPASeedOssConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPASeedOssForCausalLM(TPAModelMixin, SeedOssForCausalLM):
    """The decoder with its language-model head."""

    config: TPASeedOssConfig
    decoder_class = TPASeedOssModel

    def __init__(self, config: TPASeedOssConfig):
        super().__init__(config)
        self.model = TPASeedOssModel(config)
        self.post_init()


__all__ = ["TPASeedOssConfig", "TPASeedOssForCausalLM", "TPASeedOssModel"]
