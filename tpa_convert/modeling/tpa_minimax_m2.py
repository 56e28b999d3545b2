"""MiniMaxM2 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM, MiniMaxM2Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAMiniMaxM2Config(TPAConfigMixin, MiniMaxM2Config):
    """[`MiniMaxM2Config`] with the shapes of the TPA layers."""

    model_type = "tpa_minimax_m2"
    tpa_layers: list | dict | None = None


class TPAMiniMaxM2Model(TPAModelMixin, MiniMaxM2Model):
    """The decoder without its language-model head."""

    config: TPAMiniMaxM2Config

    def __init__(self, config: TPAMiniMaxM2Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAMiniMaxM2ForCausalLM(TPAModelMixin, MiniMaxM2ForCausalLM):
    """The decoder with its language-model head."""

    config: TPAMiniMaxM2Config
    decoder_class = TPAMiniMaxM2Model

    def __init__(self, config: TPAMiniMaxM2Config):
        super().__init__(config)
        self.model = TPAMiniMaxM2Model(config)
        self.post_init()


__all__ = ["TPAMiniMaxM2Config", "TPAMiniMaxM2ForCausalLM", "TPAMiniMaxM2Model"]
