"""Ernie4_5_Moe with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Ernie4_5_MoeModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin
from .tpa_source import AttentionNames


class TPAErnie4_5_MoeConfig(TPAConfigMixin, Ernie4_5_MoeConfig):
    """[`Ernie4_5_MoeConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_ernie4_5_moe"
    tpa_layers: list | dict | None = None


class TPAErnie4_5_MoeModel(TPAModelMixin, Ernie4_5_MoeModel):
    """The decoder without its language-model head."""

    config: TPAErnie4_5_MoeConfig
    attention_names = AttentionNames(pairs="neighbours")

    def __init__(self, config: TPAErnie4_5_MoeConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAErnie4_5_MoeForCausalLM(TPAModelMixin, Ernie4_5_MoeForCausalLM):
    """The decoder with its language-model head."""

    config: TPAErnie4_5_MoeConfig
    decoder_class = TPAErnie4_5_MoeModel

    def __init__(self, config: TPAErnie4_5_MoeConfig):
        super().__init__(config)
        self.model = TPAErnie4_5_MoeModel(config)
        self.post_init()


__all__ = ["TPAErnie4_5_MoeConfig", "TPAErnie4_5_MoeForCausalLM", "TPAErnie4_5_MoeModel"]
