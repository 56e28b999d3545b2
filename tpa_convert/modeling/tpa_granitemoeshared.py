"""GraniteMoeShared with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM, GraniteMoeSharedModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin


class TPAGraniteMoeSharedConfig(TPAConfigMixin, GraniteMoeSharedConfig):
    """[`GraniteMoeSharedConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_granitemoeshared"
    tpa_layers: list | dict | None = None


class TPAGraniteMoeSharedModel(TPAModelMixin, GraniteMoeSharedModel):
    """The decoder without its language-model head."""

    config: TPAGraniteMoeSharedConfig

    def __init__(self, config: TPAGraniteMoeSharedConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAGraniteMoeSharedForCausalLM(TPAModelMixin, GraniteMoeSharedForCausalLM):
    """The decoder with its language-model head."""

    config: TPAGraniteMoeSharedConfig
    decoder_class = TPAGraniteMoeSharedModel

    def __init__(self, config: TPAGraniteMoeSharedConfig):
        super().__init__(config)
        self.model = TPAGraniteMoeSharedModel(config)
        self.post_init()


__all__ = [
    "TPAGraniteMoeSharedConfig",
    "TPAGraniteMoeSharedForCausalLM",
    "TPAGraniteMoeSharedModel",
]
