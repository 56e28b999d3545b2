"""Cohere with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import CohereConfig, CohereForCausalLM, CohereModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin
from .tpa_source import AttentionNames


class TPACohereConfig(TPAConfigMixin, CohereConfig):
    """[`CohereConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_cohere"
    tpa_layers: list | dict | None = None


class TPACohereModel(TPAModelMixin, CohereModel):
    """The decoder without its language-model head."""

    config: TPACohereConfig
    attention_names = AttentionNames(pairs="neighbours", table="neighbours")

    def __init__(self, config: TPACohereConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPACohereForCausalLM(TPAModelMixin, CohereForCausalLM):
    """The decoder with its language-model head."""

    config: TPACohereConfig
    decoder_class = TPACohereModel

    def __init__(self, config: TPACohereConfig):
        super().__init__(config)
        self.model = TPACohereModel(config)
        self.post_init()


__all__ = ["TPACohereConfig", "TPACohereForCausalLM", "TPACohereModel"]
