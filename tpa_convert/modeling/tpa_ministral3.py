"""Ministral3 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Ministral3Config, Ministral3ForCausalLM, Ministral3Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAMinistral3Config(TPAConfigMixin, Ministral3Config):
    """[`Ministral3Config`] with the shapes of the TPA layers."""

    model_type = "tpa_ministral3"
    tpa_layers: list | dict | None = None


class TPAMinistral3Model(TPAModelMixin, Ministral3Model):
    """The decoder without its language-model head."""

    config: TPAMinistral3Config

    def __init__(self, config: TPAMinistral3Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAMinistral3ForCausalLM(TPAModelMixin, Ministral3ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAMinistral3Config
    decoder_class = TPAMinistral3Model

    def __init__(self, config: TPAMinistral3Config):
        super().__init__(config)
        self.model = TPAMinistral3Model(config)
        self.post_init()


__all__ = ["TPAMinistral3Config", "TPAMinistral3ForCausalLM", "TPAMinistral3Model"]
