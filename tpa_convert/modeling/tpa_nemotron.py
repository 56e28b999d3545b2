"""Nemotron with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import NemotronConfig, NemotronForCausalLM, NemotronModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPANemotronConfig(TPAConfigMixin, NemotronConfig):
    """[`NemotronConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_nemotron"
    tpa_layers: list | dict | None = None


class TPANemotronModel(TPAModelMixin, NemotronModel):
    """The decoder without its language-model head."""

    config: TPANemotronConfig

    def __init__(self, config: TPANemotronConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPANemotronForCausalLM(TPAModelMixin, NemotronForCausalLM):
    """The decoder with its language-model head."""

    config: TPANemotronConfig
    decoder_class = TPANemotronModel

    def __init__(self, config: TPANemotronConfig):
        super().__init__(config)
        self.model = TPANemotronModel(config)
        self.post_init()


__all__ = ["TPANemotronConfig", "TPANemotronForCausalLM", "TPANemotronModel"]
