"""Exaone4 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import Exaone4Config, Exaone4ForCausalLM, Exaone4Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAExaone4Config(TPAConfigMixin, Exaone4Config):
    """[`Exaone4Config`] with the shapes of the TPA layers."""

    model_type = "tpa_exaone4"
    tpa_layers: list | dict | None = None


class TPAExaone4Model(TPAModelMixin, Exaone4Model):
    """The decoder without its language-model head."""

    config: TPAExaone4Config

    def __init__(self, config: TPAExaone4Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAExaone4ForCausalLM(TPAModelMixin, Exaone4ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAExaone4Config
    decoder_class = TPAExaone4Model

    def __init__(self, config: TPAExaone4Config):
        super().__init__(config)
        self.model = TPAExaone4Model(config)
        self.post_init()


__all__ = ["TPAExaone4Config", "TPAExaone4ForCausalLM", "TPAExaone4Model"]
