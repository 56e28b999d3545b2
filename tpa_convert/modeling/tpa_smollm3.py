"""SmolLM3 with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import SmolLM3Config, SmolLM3ForCausalLM, SmolLM3Model

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin
from .tpa_source import AttentionNames


class TPASmolLM3Config(TPAConfigMixin, SmolLM3Config):
    """[`SmolLM3Config`] with the shapes of the TPA layers."""

    model_type = "tpa_smollm3"
    tpa_layers: list | dict | None = None


class TPASmolLM3Model(TPAModelMixin, SmolLM3Model):
    """The decoder without its language-model head."""

    config: TPASmolLM3Config
    attention_names = AttentionNames(rotated_if="use_rope")

    def __init__(self, config: TPASmolLM3Config):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPASmolLM3ForCausalLM(TPAModelMixin, SmolLM3ForCausalLM):
    """The decoder with its language-model head."""

    config: TPASmolLM3Config
    decoder_class = TPASmolLM3Model

    def __init__(self, config: TPASmolLM3Config):
        super().__init__(config)
        self.model = TPASmolLM3Model(config)
        self.post_init()


__all__ = ["TPASmolLM3Config", "TPASmolLM3ForCausalLM", "TPASmolLM3Model"]
