"""What all converted models share, whatever their family."""

import sys
from typing import Any, ClassVar

from torch import nn
from transformers import initialization as init

from .tpa_attention import AttentionNames, TPAAttention, replace_attention
from .tpa_keys import HeadGauge, KeyNorm, PairGauge, RotatedKeys


class TPAModelMixin:
    """A decoder, or a model with a decoder inside, whose attention is Tensor Product Attention."""

    attention_names: ClassVar[AttentionNames] = AttentionNames()
    _can_record_outputs: ClassVar[dict[str, Any] | None]

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        recorded = getattr(cls, "_can_record_outputs", None) or {}
        cls._can_record_outputs = {**recorded, "attentions": TPAAttention}

    def replace_attention(self) -> None:
        """Puts TPA into every layer; to be called once the source's modules are there."""
        replace_attention(self, self.attention_names)
        tell_peft(self.config.model_type)  # type: ignore[attr-defined]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, PairGauge):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, HeadGauge):
            init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
            if module.offset is not None:
                init.zeros_(module.offset)
        elif isinstance(module, KeyNorm):
            init.ones_(module.weight)
        elif isinstance(module, RotatedKeys):
            module.reset_rotary_pair()

    def _get_static_cache_init_shape(self) -> None:
        # The cache is packed: its shapes follow from the first update, not from the config's heads.
        return None


# Linear in every layout, whatever the family; of queries only where they are factored.
ADAPTED = ["feature_factor", "o_proj"]


def tell_peft(model_type: str) -> None:
    """Makes `LoraConfig()` and its like know which modules to adapt, if peft is there. It has a
    table by `model_type` for each method that adapts linear layers."""
    tables = vars(sys.modules.get("peft.utils.constants", object))
    for name, table in list(tables.items()):
        if name.endswith("_TARGET_MODULES_MAPPING") and table.get("llama") == ["q_proj", "v_proj"]:
            table.setdefault(model_type, ADAPTED)
