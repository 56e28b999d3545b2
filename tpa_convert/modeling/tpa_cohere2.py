"""Cohere2 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Cohere2Config, Cohere2ForCausalLM, Cohere2Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin
from .tpa_source import AttentionNames


class TPACohere2Config(TPAConfigMixin, Cohere2Config):
    """[`Cohere2Config`] with the shapes of the TPA layers."""

    model_type = "tpa_cohere2"
    tpa_layers: list | dict | None = None


class TPACohere2Model(TPAModelMixin, Cohere2Model):
    """The decoder without its language-model head."""

    config: TPACohere2Config
    attention_names = AttentionNames(
        pairs="neighbours", table="neighbours", rotated_if="sliding_window"
    )

    def __init__(self, config: TPACohere2Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPACohere2ForCausalLM(TPAModelMixin, Cohere2ForCausalLM):
    """The decoder with its language-model head."""

    config: TPACohere2Config
    decoder_class = TPACohere2Model

    def __init__(self, config: TPACohere2Config):
        super().__init__(config)
        self.model = TPACohere2Model(config)
        self.post_init()


__all__ = ["TPACohere2Config", "TPACohere2ForCausalLM", "TPACohere2Model"]
