"""Phi with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import PhiConfig, PhiForCausalLM, PhiModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin
from .tpa_source import AttentionNames


class TPAPhiConfig(TPAConfigMixin, PhiConfig):
    """[`PhiConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_phi"
    tpa_layers: list | dict | None = None


class TPAPhiModel(TPAModelMixin, PhiModel):
    """The decoder without its language-model head."""

    config: TPAPhiConfig
    attention_names = AttentionNames(output="dense")

    def __init__(self, config: TPAPhiConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAPhiForCausalLM(TPAModelMixin, PhiForCausalLM):
    """The decoder with its language-model head."""

    config: TPAPhiConfig
    decoder_class = TPAPhiModel

    def __init__(self, config: TPAPhiConfig):
        super().__init__(config)
        self.model = TPAPhiModel(config)
        self.post_init()


__all__ = ["TPAPhiConfig", "TPAPhiForCausalLM", "TPAPhiModel"]
