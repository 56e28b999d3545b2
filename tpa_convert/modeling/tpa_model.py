"""What all converted models share, whatever their family."""

from typing import Any, ClassVar

from torch import nn
from transformers import initialization as init

from .tpa_adapters import tell_peft
from .tpa_attention import TPAAttention, replace_attention
from .tpa_coder import RowCoder
from .tpa_gauges import BlockGauge, HeadGauge, PairGauge
from .tpa_keys import KeyNorm, RotatedKeys
from .tpa_paged import pack_paged_cache
from .tpa_source import AttentionNames
from .tpa_values import KeyPrediction


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
        tell_peft(self.config)  # type: ignore[attr-defined]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        pack_paged_cache(self)
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, PairGauge):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, HeadGauge | BlockGauge | KeyPrediction):
            init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
            if isinstance(module, HeadGauge) and module.offset is not None:
                init.zeros_(module.offset)
        elif isinstance(module, KeyNorm):
            init.ones_(module.weight)
        elif isinstance(module, RotatedKeys):
            module.reset_rotary_pair()
        elif isinstance(module, RowCoder):
            init.zeros_(module.mean)
            for scale in (module.step, module.spread, module.importance):
                init.ones_(scale)
            module.reset_constants()

    def _get_static_cache_init_shape(self) -> None:
        # The cache is packed: its shapes follow from the first update, not from the config's heads.
        return None
