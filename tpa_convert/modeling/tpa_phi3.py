"""Phi3 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin
from .tpa_source import AttentionNames


class TPAPhi3Config(TPAConfigMixin, Phi3Config):
    """[`Phi3Config`] with the shapes of the TPA layers."""

    model_type = "tpa_phi3"
    tpa_layers: list | dict | None = None


class TPAPhi3Model(TPAModelMixin, Phi3Model):
    """The decoder without its language-model head."""

    config: TPAPhi3Config
    attention_names = AttentionNames(fused="qkv_proj")

    def __init__(self, config: TPAPhi3Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAPhi3ForCausalLM(TPAModelMixin, Phi3ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAPhi3Config
    decoder_class = TPAPhi3Model

    def __init__(self, config: TPAPhi3Config):
        super().__init__(config)
        self.model = TPAPhi3Model(config)
        self.post_init()


__all__ = ["TPAPhi3Config", "TPAPhi3ForCausalLM", "TPAPhi3Model"]
