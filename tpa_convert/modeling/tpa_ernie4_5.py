"""Ernie4_5 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Ernie4_5Config, Ernie4_5ForCausalLM, Ernie4_5Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin
from .tpa_source import AttentionNames


class TPAErnie4_5Config(TPAConfigMixin, Ernie4_5Config):
    """[`Ernie4_5Config`] with the shapes of the TPA layers."""

    model_type = "tpa_ernie4_5"
    tpa_layers: list | dict | None = None


class TPAErnie4_5Model(TPAModelMixin, Ernie4_5Model):
    """The decoder without its language-model head."""

    config: TPAErnie4_5Config
    attention_names = AttentionNames(pairs="neighbours")

    def __init__(self, config: TPAErnie4_5Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAErnie4_5ForCausalLM(TPAModelMixin, Ernie4_5ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAErnie4_5Config
    decoder_class = TPAErnie4_5Model

    def __init__(self, config: TPAErnie4_5Config):
        super().__init__(config)
        self.model = TPAErnie4_5Model(config)
        self.post_init()


__all__ = ["TPAErnie4_5Config", "TPAErnie4_5ForCausalLM", "TPAErnie4_5Model"]
