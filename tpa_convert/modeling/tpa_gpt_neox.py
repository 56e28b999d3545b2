"""GPTNeoX with Tensor Product Attention (arXiv 2501.06425)."""

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel

from .tpa_configuration import TPAConfigMixin
from .tpa_model import TPAModelMixin
from .tpa_source import AttentionNames


class TPAGPTNeoXConfig(TPAConfigMixin, GPTNeoXConfig):
    """[`GPTNeoXConfig`] with the shapes of the TPA layers."""

    model_type = "tpa_gpt_neox"
    tpa_layers: list | dict | None = None


class TPAGPTNeoXModel(TPAModelMixin, GPTNeoXModel):
    """The decoder without its language-model head."""

    config: TPAGPTNeoXConfig
    attention_names = AttentionNames(
        attention="attention", fused="query_key_value", fused_by_head=True, output="dense"
    )

    def __init__(self, config: TPAGPTNeoXConfig):
        super().__init__(config)
        self.replace_attention()
        self.post_init()


class TPAGPTNeoXForCausalLM(TPAModelMixin, GPTNeoXForCausalLM):
    """The decoder with its language-model head."""

    config: TPAGPTNeoXConfig
    decoder_class = TPAGPTNeoXModel

    def __init__(self, config: TPAGPTNeoXConfig):
        super().__init__(config)
        self.gpt_neox = TPAGPTNeoXModel(config)
        self.post_init()


__all__ = ["TPAGPTNeoXConfig", "TPAGPTNeoXForCausalLM", "TPAGPTNeoXModel"]
